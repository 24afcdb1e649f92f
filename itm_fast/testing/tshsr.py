"""TSHSR's scoring as a loop, one caption an iteration, all images at once: the slow form of `itm_fast.models.tshsr`.

The paper (Chen et al., arXiv 2203.05349) is known to us by its abstract; the equations are not public to us. What is
computed here is the reconstruction that the model's docstring gives, step by step and without any algebra, over a
plain state_dict, so that it is both the oracle of the tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .scan import attend, l2norm
from .sgraf import linear, reason, self_attention

State = Mapping[str, Tensor]


def stream(state: State, name: str, overall: Tensor, local: Tensor) -> Tensor:
    """Hierarchical similarity reasoning of one stream: global nodes [I, S], local nodes [I, n, S] -> scores [I]."""
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    nodes, level = [rearrange(overall, "i s -> i 1 s"), local], local
    for k in range(sum(key.startswith("context.") for key in own)):
        assignment = torch.softmax(level @ own[f"context.{k}.weight"].t(), 1)  # [I, n, c]
        level = torch.bmm(rearrange(assignment, "i n c -> i c n"), level)
        nodes.append(level)
    joint = torch.cat(nodes, 1)
    for k in range(len({key.split(".")[1] for key in own if key.startswith("graph.")})):
        joint = reason(own, f"graph.{k}", joint)
    return rearrange(torch.sigmoid(linear(own, "sim_eval_w", joint[:, 0, :])), "i 1 -> i")


def loop(
    state: State,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    scale_t2i: float = 9.0,
    scale_i2t: float = 4.0,
    training: bool = False,
    dropout: float = 0.4,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: a state_dict of `itm_fast.models.tshsr.TwoStreamReasoning`; in training its BatchNorm buffers are
            updated in place.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        scale_t2i: inverse temperature of words attending to regions.
        scale_i2t: inverse temperature of regions attending to words.
        training: batch statistics and dropout, as in `.train()` mode.
        dropout: probability of the dropouts in VisualSA and TextSA.

    Returns:
        Scores in (0, 1), [I, T].

    >>> from itm_fast.models.tshsr import TwoStreamReasoning
    >>> state = TwoStreamReasoning(8, 4).state_dict()
    >>> loop(state, torch.rand(2, 36, 8), torch.rand(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """
    images = image.size(0)
    image_global = self_attention(state, "v_global_w", image, training, dropout)
    scores = []
    for t in range(caption.size(0)):
        words = rearrange(caption[t, : int(lengths[t])], "w d -> 1 w d")
        caption_global = self_attention(state, "t_global_w", words, training, dropout)
        words = words.repeat(images, 1, 1)
        overall = l2norm(linear(state, "sim_tranglo_w", torch.pow(image_global - caption_global, 2)), 1)

        attended = l2norm(attend(words, image, "clipped_l2norm", scale_t2i), 2)
        of_words = l2norm(linear(state, "t2i.sim_tranloc_w", torch.pow(attended - words, 2)), 2)
        attended = l2norm(attend(image, words, "clipped_l2norm", scale_i2t), 2)
        of_regions = l2norm(linear(state, "i2t.sim_tranloc_w", torch.pow(attended - image, 2)), 2)
        scores.append((stream(state, "t2i", overall, of_words) + stream(state, "i2t", overall, of_regions)) / 2)
    return torch.stack(scores, 1)
