"""IMRAM's scoring loop (Chen et al., CVPR 2020): one caption an iteration, all images at once.

Our own code, of the operations that the published loop has, step by step, over a plain state_dict: the oracle of the
tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .scan import attend, cosine, l2norm
from .sgraf import linear

WAYS = {"text_IMRAM": ("t2i",), "image_IMRAM": ("i2t",), "full_IMRAM": ("t2i", "i2t")}


def loop(
    state: Mapping[str, Tensor],
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int],
    *,
    model_mode: str = "full_IMRAM",
    iteration_step: int = 3,
    lambda_softmax: float = 9.0,
    no_IMRAM_norm: bool = False,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: `linear_t2i`, `gate_t2i`, `linear_i2t` and `gate_i2t`, weight [D, 2 D] and bias [D].
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        model_mode: "text_IMRAM", "image_IMRAM" or "full_IMRAM".
        iteration_step: K.
        lambda_softmax: inverse temperature of the attention.
        no_IMRAM_norm: leave refined queries as the gate makes them.

    Returns:
        Scores, [I, T].
    """
    total = image.new_zeros(len(image), len(caption))
    for way in WAYS[model_mode]:
        columns = []
        for t in range(caption.size(0)):
            words = caption[t, : int(lengths[t]), :].unsqueeze(0).contiguous().repeat(image.size(0), 1, 1)
            first, context = (words, image) if way == "t2i" else (image, words)
            query, score = first, image.new_zeros(len(image))
            for _ in range(iteration_step):
                attended = attend(query, context, "clipped_l2norm", lambda_softmax)
                score = score + cosine(first, attended, 2).mean(dim=1)
                both = torch.cat([query, attended], 2)
                refined = torch.tanh(linear(state, f"linear_{way}", both))
                gate = torch.sigmoid(linear(state, f"gate_{way}", both))
                query = query * gate + refined * (1 - gate)
                if not no_IMRAM_norm:
                    query = l2norm(query, -1)
            columns.append(score)
        total = total + torch.stack(columns, 1)
    return total
