"""The nodes of pairs, (1) and (2) of `ops/similarity_nodes.py`, by the kernels of `_attention` and `_projection`.

A block of images and neighbouring captions at a time. One pass of `_projection` makes the words' nodes, another one the
global nodes, with the images' global vectors in place of attended vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast.packing import bounds

from . import _attention, _launch
from ._graph import Block, Rows
from ._norms import norm_of
from ._projection import project

NORM = "clipped_l2norm"


class Maker:
    """Makes the nodes of pairs. Arguments: those of `similarity_nodes`, which the pair scorers begin with too."""

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
        """Write the nodes of some images and captions into `out` [images, rows, S].

        Args:
            out_first: index in `out` of the first of these images.
            place_first: packed node that is row 0 of `out`.
        """
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
        """Nodes of a block in a new buffer; its first image has number `first`."""
        out = self.regions.rows.new_empty(block.images, block.nodes, len(self.local[0]))
        self(slice(first, first + block.images), block.window.captions, out, 0, block.window.rows.start)
        return block.scratch(out)


def word_bytes(regions: int) -> int:
    """Scratch bytes per word and image, at most: its affinities, their norms, and 1 / (z (|P| + eps))."""
    return 4 * (3 * (regions + 16) + 16)


def image_bytes(regions: int) -> int:
    """Scratch bytes per image, whatever the captions: its Gram matrix."""
    return 4 * regions * (regions + 16)
