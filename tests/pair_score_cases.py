"""Inputs that the tests of the two pair scorers share."""

import torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# images, words per caption, regions, D, S, regions of each image
SHAPES = {
    "I1-T1-R1-W1-D1-S1": (1, (1,), 1, 1, 1, None),
    "I5-T5-R9-W13-D64-S32": (5, (13, 1, 4, 4, 7), 9, 64, 32, None),
    "I3-T3-R7-W5-D17-S11-ragged": (3, (5, 5, 2), 7, 17, 11, (7, 1, 4)),
}
INPUTS = [
    "image", "image_global", "words", "caption_global", "local_weight", "local_bias", "global_weight", "global_bias",
]  # fmt: skip


def edges(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def drawer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(draw, I, counts, R, D, S):
    """The scorers' first eight arguments, in INPUTS' order: unit rows, and biases that leave pairs apart."""
    unit = torch.nn.functional.normalize
    features = [unit(draw(*shape), dim=-1) for shape in ((I, R, D), (I, D), (sum(counts), D), (len(counts), D))]
    return [*features, draw(S, D), 0.1 * draw(S), draw(S, D), 0.1 * draw(S)]


def lengths(regions):
    return None if regions is None else torch.tensor(regions, dtype=torch.int32)
