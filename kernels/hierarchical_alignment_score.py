"""`hierarchical_alignment_score` in Triton: equations in `ops/hierarchical_alignment_score.py`.

For each block of images and captions, `_affinity` computes A and, with scalar gates, C and the Gram matrices G and H.
From these `_alignment` computes the scores. `_alignment_vectors` computes those that need the pairs' vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import bounds, spans

from . import _launch, _tiles
from ._affinity import affinity, gram, leading
from ._alignment import Block, Problem, align, problem
from ._alignment_vectors import EACH, align_vectors, programs
from ._length_plan import Window, length_plan

OP = "hierarchical_alignment_score"
WINDOW = 1 << 14  # the most words in a window of captions; a power of two


def forward(
    image: Tensor, image_key: Tensor, image_gate: Tensor, words: Tensor, word_key: Tensor, word_gate: Tensor,
    image_pool: Tensor, caption_pool: Tensor, cu_seqlens: Tensor, *options,
) -> Tensor:  # fmt: skip
    """Scores [I, T]. `options`: the last arguments of `problem`, from region_lengths on."""
    score = image.new_empty(len(image), len(cu_seqlens) - 1)
    if not score.numel():
        bounds(cu_seqlens, len(words), OP)
        return score
    with _launch.on(image.device):
        given = problem(
            OP, image, image_key, image_gate, words, word_key, word_gate, image_pool, caption_pool, cu_seqlens, *options
        )  # fmt: skip
        limit = scratch_bytes(image.device)
        plan = length_plan(cu_seqlens, len(words), OP, _tiles.CAPTION_TILES, _window(given, limit))
        for window in plan.windows:
            _score_window(given, window, plan.order, limit, score)
    return score


def _score_window(given: Problem, window: Window, order: Tensor, limit: int, score: Tensor) -> None:
    gram_t = _empty(0 if given.vector else window.rows.stop - window.rows.start, given.captions.longest, score)
    if not given.vector:
        gram(given.captions, window.captions.start, window.captions.stop, gram_t)
    for images in spans(len(score), _images(given, window, limit - gram_t.nbytes)):
        _block(given, Block(images, window, order), gram_t, score)


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.empty(rows, leading(columns), dtype=torch.float32, device=like.device)


def _block(given: Problem, block: Block, gram_t: Tensor, score: Tensor) -> None:
    images, captions, dtype = block.images, block.window.captions, score.dtype
    x, q = block.window.rows, slice(images.start * given.regions, images.stop * given.regions)
    count, precision = q.stop - q.start, _tiles.products(dtype)
    affinities = _empty(count, x.stop - x.start, score)
    affinity(given.image_key, given.word_key, q, x, affinities, precision)
    pairs = images.stop - images.start, captions.stop - captions.start
    poor = torch.empty(pairs, dtype=torch.int8, device=score.device)
    if not given.vector:
        cross = torch.empty_like(affinities)
        affinity(given.images.rows, given.captions.rows, q, x, cross, precision)
        gram_v = _empty(count, given.regions, score)
        gram(given.images, images.start, images.stop, gram_v)
        align(given, block, affinities, cross, gram_v, gram_t, score, poor)
    align_vectors(given, block, affinities, score, poor)


def _window(given: Problem, limit: int) -> int:
    """How many words' scratch, with that of one image, fits `limit` bytes: a power of two, WINDOW at most."""
    R, D = given.regions, given.images.rows.shape[1]
    # At worst each caption has one word. Row strides are rounded up to a multiple of 16: `leading(R) + 32` below.
    word = 4 * R * (1 if given.vector else 2) + 1 + 8 * D // EACH
    word += 0 if given.vector else 4 * leading(given.captions.longest)
    image = 8 * D + 4 * R * (leading(R) + 32)
    return min(WINDOW, 1 << (max(1, (limit - image) // word).bit_length() - 1))


def _images(given: Problem, window: Window, room: int) -> int:
    """How many images' scratch with a window fits `room` bytes; at least one."""
    R, D, columns = given.regions, given.images.rows.shape[1], leading(window.rows.stop - window.rows.start)
    each = 4 * R * columns * (1 if given.vector else 2) + (0 if given.vector else 4 * R * leading(R))
    each += programs(1, window) * 8 * D + window.captions.stop - window.captions.start
    return max(1, min(room // each, _tiles.PIECE // (R * columns)))
