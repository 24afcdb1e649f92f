"""SHAN's scoring loop (Ji, Chen, Wang; IJCAI 2021, equations 3 to 16): one caption an iteration, all images at once.

Written from the paper's equations, over a plain state_dict, so that it is both the oracle of the tests and the
baseline of the benchmarks: every attended vector, gate and context vector is formed for every pair. The authors
published no code. What the paper leaves open is an argument here, or read off the shapes in the state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .scan import cosine, l2norm

State = Mapping[str, Tensor]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _context(state: State, gate: str, pool: str, local: Tensor, attended: Tensor) -> Tensor:
    """Equations 8 and 9: the context vectors [I, D] of locals [I, n, D] and what they attend to."""
    g = torch.sigmoid(_linear(state, gate, torch.cat([local, attended], dim=2)))
    fused = g * local + (1 - g) * attended
    weight = F.softmax(_linear(state, pool, fused), dim=1)
    return torch.sum(weight * fused, dim=1)


def _global_to_local(context: Tensor, local: Tensor) -> Tensor:
    """Equations 10 and 11: what a context vector [I, D] attends to among locals [I, n, D], by cosine."""
    similarity = cosine(rearrange(context, "i d -> i 1 d"), local, 2)
    weight = F.softmax(similarity, dim=1)
    return torch.sum(rearrange(weight, "i n -> i n 1") * local, dim=1)


def loop(
    state: State,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    direction: str = "both",
    scale: float = 15.0,
    pool: str = "mean",
    affinity: str = "cosine",
    local_mix: float = 0.3,
    global_mix: float = 0.5,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: a state_dict of `itm_fast.models.shan.EncoderSimilarity`; without `caption_gate` keys both modalities
            share `image_gate`, and a gate is a scalar or a vector as its weight has one row or D.
        image: [I, R, D].
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        direction: "t2i" (SHAN-T2I), "i2t" (SHAN-I2T) or "both" (SHAN-full).
        scale: lambda of equations 4 and 5.
        pool: "mean" or "sum" of the cosines in equation 7.
        affinity: "cosine", of the projected vectors; or "dot", equation 3 to the letter.
        local_mix: mu 1 of equation 7.
        global_mix: mu 2 of equation 13.

    Returns:
        Scores, [I, T].

    >>> from itm_fast.models.shan import EncoderSimilarity
    >>> state = EncoderSimilarity(8).state_dict()
    >>> loop(state, torch.rand(2, 36, 8), torch.rand(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """
    pooled = {"mean": torch.mean, "sum": torch.sum}[pool]
    caption_gate = "caption_gate" if "caption_gate.weight" in state else "image_gate"
    scores = []
    images = image.size(0)
    image_key = _linear(state, "region_projection", image)
    if affinity == "cosine":
        image_key = l2norm(image_key, 2)
    for t in range(caption.size(0)):
        words = rearrange(caption[t, : int(lengths[t])], "w d -> 1 w d").repeat(images, 1, 1)
        word_key = _linear(state, "word_projection", words)
        if affinity == "cosine":
            word_key = l2norm(word_key, 2)
        logits = scale * torch.bmm(image_key, rearrange(word_key, "i w d -> i d w"))  # [I, R, W]

        if direction != "t2i":
            attended = torch.bmm(F.softmax(logits, dim=2), words)  # [I, R, D]
            local_v = pooled(cosine(image, attended, 2), dim=1)
            context = _context(state, "image_gate", "image_pool", image, attended)
            found = _global_to_local(context, words)
            global_v = cosine(context, found, 1)
            image_global = context + found
        else:
            image_global = image.mean(dim=1)
        if direction != "i2t":
            attended = torch.bmm(rearrange(F.softmax(logits, dim=1), "i r w -> i w r"), image)  # [I, W, D]
            local_t = pooled(cosine(words, attended, 2), dim=1)
            context = _context(state, caption_gate, "caption_pool", words, attended)
            found = _global_to_local(context, image)
            global_t = cosine(context, found, 1)
            caption_global = context + found
        else:
            caption_global = words.mean(dim=1)

        if direction == "both":
            local = local_mix * local_v + (1 - local_mix) * local_t
            overall = global_mix * global_v + (1 - global_mix) * global_t
        elif direction == "t2i":
            local, overall = local_t, global_t
        elif direction == "i2t":
            local, overall = local_v, global_v
        else:
            raise ValueError(f"direction {direction!r} is unknown: choose t2i, i2t or both")
        scores.append(local + overall + cosine(image_global, caption_global, 1))
    return torch.stack(scores, 1)
