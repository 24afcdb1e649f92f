"""The nodes of pairs: equations (1) and (2) of `ops/similarity_nodes.py`, by `_attention` and `_projection`.

Some images and some neighbouring captions at a time: the words' rows by the one pass over D of `_projection`, and the
global ones by the same pass with the images' global vectors for what is attended to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast.packing import bounds

from . import _attention, _launch
from ._attention import norm_of
from ._graph import Block, Rows
from ._projection import project

NORM = "clipped_l2norm"


class Maker:
    """Makes nodes of the inputs that `similarity_nodes` and the pair scorers take first, in their order."""

    def __init__(
        self,
        op: str,
        image: Tensor,
        image_global: Tensor,
        words: Tensor,
        caption_global: Tensor,
        local_weight: Tensor,
        local_bias: Tensor,
        global_weight: Tensor,
        global_bias: Tensor,
        cu_seqlens: Tensor,
        region_lengths: Tensor | None,
        scale: float,
    ) -> None:
        self.edge = bounds(cu_seqlens, len(words), op)
        self.words, self.regions = _launch.sets(op, image, words, cu_seqlens, region_lengths, "t2i")
        self.captions, self.images = _launch.singles(caption_global), _launch.singles(image_global)
        self.local = _launch.aligned(local_weight), _launch.aligned(local_bias)
        self.overall = _launch.aligned(global_weight), _launch.aligned(global_bias)
        self.scale = scale
        owner = self.words.owner.long()
        self.word_place = torch.arange(len(words), device=words.device) + owner + 1
        count = torch.arange(len(caption_global), device=words.device)
        self.caption_place = self.words.start.long() + count

    def __call__(self, images: slice, captions: slice, out: Tensor, out_first: int, place_first: int) -> None:
        """Nodes into `out` [., rows, S]: these images from number `out_first` on, and row r at r - `place_first`."""
        R = self.regions.edge[1] if len(self.regions.edge) > 1 else 0
        x = slice(images.start * R, images.stop * R)
        piece = _launch.Piece(images, captions, x, slice(self.edge[captions.start], self.edge[captions.stop]))
        gram = _attention.grams(self.regions, piece)
        attended = _attention.attend(
            "weights", self.words, self.regions, piece, gram, None, norm_of(NORM), self.scale
        )
        (weight, bias), at = self.local, self.word_place
        project(
            self.words, self.regions, piece, attended, weight, bias, at, out,
            out_first=out_first, place_first=place_first,
        )  # fmt: skip
        piece = _launch.Piece(images, captions, images, captions)
        (weight, bias), at = self.overall, self.caption_place
        project(
            self.captions, self.images, piece, None, weight, bias, at, out,
            out_first=out_first, place_first=place_first,
        )  # fmt: skip

    def block(self, first: int, block: Block) -> Rows:
        """Nodes of a block in a buffer of their own."""
        out = self.regions.rows.new_empty(block.images, block.nodes, len(self.local[0]))
        self(slice(first, first + block.images), block.window.captions, out, 0, block.window.rows.start)
        return block.scratch(out)


def word_bytes(regions: int) -> int:
    """Scratch that a word with an image takes: the affinities, at worst as many norms, and 1 / |P|."""
    return 4 * (3 * (regions + 16) + 16)


def image_bytes(regions: int) -> int:
    """Scratch that an image takes with any captions: its Gram matrix."""
    return 4 * regions * (regions + 16)
