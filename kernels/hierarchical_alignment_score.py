"""`hierarchical_alignment_score` in Triton: equations in `ops/hierarchical_alignment_score.py`.

Blocks of images x windows of captions: affinities A, and with scalar gates products C and the Gram matrices of both
sides, by `_affinity`; then the pairs' scores by `_alignment`, from these alone, or by `_alignment_vectors`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import Stretch, bounds, length_plan, spans

from . import _launch, _tiles
from ._affinity import affinity, gram, leading
from ._alignment import Block, Problem, align, problem
from ._alignment_vectors import EACH, align_vectors, programs

OP = "hierarchical_alignment_score"
WINDOW = 1 << 14  # words that are taken at a time, at the most


def forward(image: Tensor, *args) -> Tensor:
    """Scores [I, T]."""
    words, cu_seqlens = args[2], args[7]
    score = image.new_empty(len(image), len(cu_seqlens) - 1)
    if not score.numel():
        bounds(cu_seqlens, len(words), OP)
        return score
    with _launch.on(image.device):
        given = problem(OP, image, *args)
        limit = scratch_bytes(image.device)
        plan = length_plan(cu_seqlens, len(words), OP, _tiles.CAPTION_TILES, _window(given, limit))
        for window in plan.windows:
            _score_window(given, window, plan.order, limit, score)
    return score


def _score_window(given: Problem, window: Stretch, order: Tensor, limit: int, score: Tensor) -> None:
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
    """Words whose scratch with one image fits `limit` bytes: a power of 2."""
    R, D = given.regions, given.images.rows.shape[1]
    # A caption has a word at the least; a window is a multiple of 16 wide.
    word = 4 * R * (1 if given.vector else 2) + 1 + 8 * D // EACH
    word += 0 if given.vector else 4 * leading(given.captions.longest)
    image = 8 * D + 4 * R * (leading(R) + 32)
    return min(WINDOW, 1 << (max(1, (limit - image) // word).bit_length() - 1))


def _images(given: Problem, window: Stretch, room: int) -> int:
    """Images whose scratch with a window fits `room` bytes, one at the least."""
    R, D, columns = given.regions, given.images.rows.shape[1], leading(window.rows.stop - window.rows.start)
    each = 4 * R * columns * (1 if given.vector else 2) + (0 if given.vector else 4 * R * leading(R))
    each += programs(1, window) * 8 * D + window.captions.stop - window.captions.start
    return max(1, min(room // each, _tiles.PIECE // (R * columns)))
