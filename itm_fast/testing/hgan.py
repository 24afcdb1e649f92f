"""HGAN's scoring as a loop, one caption an iteration, all images at once: the slow form of `itm_fast.models.hgan`.

The paper (Guo et al., arXiv 2212.08281) is known to us by its abstract; the equations are not public to us. What is
computed here is the reconstruction that the model's docstring gives, step by step and without any algebra, over a
plain state_dict, so that it is both the oracle of the tests and the baseline of the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .scan import attend, cosine, l2norm
from .sgraf import self_attention

State = Mapping[str, Tensor]


def graph(state: State, name: str, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
    """All layers of a feature graph: x [B, L, D], 0/1 adjacency [B, L, L] -> [B, L, D]."""
    layers = len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})
    for k in range(layers):
        query, key, value = (state[f"{name}.{k}.{part}.weight"] for part in ("query", "key", "value"))
        logits = torch.bmm(x @ query.t(), rearrange(x @ key.t(), "b l d -> b d l")) / math.sqrt(x.shape[2])
        edge = torch.exp(logits - logits.max(2, keepdim=True)[0])
        if adjacency is not None:
            edge = edge * adjacency
        total = edge.sum(2, keepdim=True)
        edge = edge / torch.where(total > 0, total, torch.ones_like(total))
        x = l2norm(x + torch.relu(torch.bmm(edge, x) @ value.t()), 2)
    return x


def mfar(state: State, x: Tensor, other: Tensor) -> Tensor:
    """MFAR of x [B, L, D], each row with its `other` [B, L, D]: aggregate, rearrange, and add what comes out."""
    joined = torch.cat([x, other], 2)
    total = torch.zeros_like(x)
    for k in range(sum(key.startswith("mfar.weight.") for key in state)):
        weight, bias = state[f"mfar.weight.{k}"], state[f"mfar.bias.{k}"]
        groups = rearrange(joined, "b l (two c d) -> c b l (two d)", two=2, c=len(weight))
        mapped = [group @ of_group.t() for group, of_group in zip(groups, weight)]
        total = total + torch.relu(torch.cat(mapped, 2) + bias)
    return l2norm(x + total, 2)


def refine(
    state: State, side: str, x: Tensor, adjacency: Tensor | None, training: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """Locals [B, L, D] of the side "v" or "t" -> refined locals [B, L, D] and global vectors [B, D]."""
    x = graph(state, f"{side}_graph", x, adjacency)
    overall = rearrange(self_attention(state, f"{side}_global_w", x, training, dropout), "b d -> b 1 d")
    refined = mfar(state, x, overall.repeat(1, x.shape[1], 1))
    return refined, rearrange(mfar(state, overall, x.mean(1, keepdim=True)), "b 1 d -> b d")


def global_to_local(vector: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Cosine of vectors [I, D] with what they attend to in rows [I, L, D] -> [I]."""
    similarity = cosine(rearrange(vector, "i d -> i 1 d"), rows, 2)
    weight = torch.softmax(scale * similarity, 1)
    return cosine(vector, (rearrange(weight, "i l -> i l 1") * rows).sum(1), 1)


def loop(
    state: State,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    levels: Sequence[float] = (1.0, 1.0, 1.0),
    scale_t2i: float = 9.0,
    scale_i2t: float = 4.0,
    scale_global: float = 1.0,
    share_local: float = 0.5,
    share_global: float = 0.5,
    image_adjacency: Tensor | None = None,
    caption_adjacency: Tensor | None = None,
    training: bool = False,
    dropout: float = 0.4,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: a state_dict of `itm_fast.models.hgan.HierarchicalAlignment`; in training its BatchNorm buffers are
            updated in place.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        levels: weights of the local-local, the global-local and the global-global similarity.
        scale_t2i: inverse temperature of words attending to regions.
        scale_i2t: inverse temperature of regions attending to words.
        scale_global: inverse temperature of global vectors attending to locals.
        share_local: share of t2i in the local-local similarity.
        share_global: share of the image's vector in the global-local similarity.
        image_adjacency: 0/1, [I, R, R].
        caption_adjacency: 0/1, [T, W, W].
        training: batch statistics and dropout, as in `.train()` mode.
        dropout: probability of the dropouts in VisualSA and TextSA.

    Returns:
        Scores, [I, T].

    >>> from itm_fast.models.hgan import HierarchicalAlignment
    >>> state = HierarchicalAlignment(16).state_dict()
    >>> loop(state, torch.rand(2, 36, 16), torch.rand(3, 5, 16), [5, 2, 4]).shape
    torch.Size([2, 3])
    """
    images = image.size(0)
    regions, image_global = refine(state, "v", image, image_adjacency, training, dropout)
    scores = []
    for t in range(caption.size(0)):
        n = int(lengths[t])
        near = None if caption_adjacency is None else caption_adjacency[t : t + 1, :n, :n]
        words, caption_global = refine(state, "t", caption[t : t + 1, :n, :], near, training, dropout)
        words, caption_global = words.repeat(images, 1, 1), caption_global.repeat(images, 1)

        of_words = cosine(words, attend(words, regions, "clipped_l2norm", scale_t2i), 2).mean(1)
        of_regions = cosine(regions, attend(regions, words, "clipped_l2norm", scale_i2t), 2).mean(1)
        local = share_local * of_words + (1 - share_local) * of_regions
        of_image = global_to_local(image_global, words, scale_global)
        of_caption = global_to_local(caption_global, regions, scale_global)
        between = share_global * of_image + (1 - share_global) * of_caption
        overall = cosine(image_global, caption_global, 1)
        scores.append(levels[0] * local + levels[1] * between + levels[2] * overall)
    return torch.stack(scores, 1)
