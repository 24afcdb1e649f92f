"""The pair scorer of GSMN (Liu et al., CVPR 2020): graph structured matching, after CrossmodalGroup/GSMN's code.

With queries q, the words t or the regions v, each attending to the other side as in SCAN (P_q, inverse temperature
lambda, clipped l2 norm), and vectors of size D split into B blocks:

    x_q = the cosines of q's and P_q's blocks, one number a block                                      (1)
    y_j = C_k x_j + c_k for k = 1 to 8, one after the other, of word j                                  (2)
    y_i = C'_k x_i sum over the image's regions i' of g_ii'k, one after the other, of region i          (3)
    g_ii'k ~ N(rho_ii'; m_k, s_k^2) N(theta_ii'; m'_k, s'_k^2), which add up to 1 over the 8 kernels k  (4)
    S   = mean_j O_2 tanh(O_1 y_j) + mean_i O'_2 tanh(O'_1 y_i),   O with weight norm                   (5)

rho and theta are the distance and the angle between the centres of two regions' boxes. As published, every neighbour of
a node is a copy of the node, so that nothing passes along the edges of either graph: the words' graph has no effect,
dense and sparse models give the same scores, and `params` has none. (3) and (4) follow from the boxes alone. Captions
of one word, on which the published code fails, are scored as all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from .._names import Direction
from ..data.boxes import HOW_BOXES
from ..nn import Attention, State, check_inputs
from ..ops import _recompute, attended_vectors
from ..packing import region_counts
from ._boxes import checked
from ._common import PaddedScorer, cosine, without_padding
from ._lengths import packed
from ._pair_blocks import blocks, lengths, mean_over_queries
from ._rows import linear
from ._sgraf_attention import pair_attention

NAME = "StructuredMatching"
KERNELS, WIDTH = 8, 4  # outputs of each kernel
HIDDEN = KERNELS * WIDTH
TINY = 1e-14  # added to variances


class _Output(nn.Module):
    """Linear whose rows are g v / |v|, under the published checkpoints' keys."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        linear = nn.Linear(HIDDEN, out_features)
        self.bias, self.weight_v = linear.bias, linear.weight
        self.weight_g = nn.Parameter(linear.weight.detach().norm(dim=1, keepdim=True))

    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))


def _layers(num_block: int, bias: bool) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(num_block, WIDTH, bias=bias) for _ in range(KERNELS))
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
    return layers


class _RegionKernels(nn.Module):
    """The weights of (3) and (4)."""

    def __init__(self, num_block: int) -> None:
        super().__init__()
        self.mean_rho, self.precision_rho = (nn.Parameter(torch.rand(KERNELS, 1)) for _ in range(2))
        self.mean_theta = nn.Parameter((2 * torch.rand(KERNELS, 1) - 1) * math.pi)
        self.precision_theta = nn.Parameter(torch.rand(KERNELS, 1))
        self.conv_weights = _layers(num_block, bias=False)

    def forward(self, bbox: Tensor, region_lengths: Tensor | None) -> Tensor:
        """(4), summed over the regions i' that an image has: bbox [I, R, 4] -> [I, R, 8]."""
        real = None
        if region_lengths is not None:
            bbox, real = without_padding(bbox, region_lengths)
        centre = (bbox[..., :2] + bbox[..., 2:]) / 2
        apart = centre[:, :, None] - centre[:, None]  # [I, R, R, 2]
        rho, theta = apart.square().sum(-1).sqrt(), torch.atan2(apart[..., 0], apart[..., 1])
        turn = (theta[..., None] - self.mean_theta[:, 0]).abs()
        turn = torch.minimum(turn, (2 * math.pi - turn).abs())
        exponent = (rho[..., None] - self.mean_rho[:, 0]).square() / (TINY + self.precision_rho[:, 0].square())
        exponent = exponent + turn.square() / (TINY + self.precision_theta[:, 0].square())
        share = (-exponent / 2).softmax(-1)
        return (share if real is None else share * real[:, None, :, None]).sum(2)


class _WordKernels(nn.Module):
    """The weights of (2)."""

    def __init__(self, num_block: int) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.ones(KERNELS, 1))  # has no effect, as published
        self.conv_weights = _layers(num_block, bias=True)


class _Side(nn.Module):
    """The weights of one side, (2) or (3), and (5)."""

    def __init__(self, name: str, kernels: nn.Module) -> None:
        super().__init__()
        self.add_module(name, kernels)
        self.out_1, self.out_2 = _Output(HIDDEN), _Output(1)

    def stacked(self) -> list[Tensor]:
        """C [32, B], O_1, its bias, O_2, its bias, and c [32] where there is one."""
        layers: Any = next(self.children()).conv_weights
        biases = [layer.bias for layer in layers if layer.bias is not None]
        outputs = [x for output in (self.out_1, self.out_2) for x in (output.weight(), output.bias)]
        return [torch.cat([layer.weight for layer in layers]), *outputs, *([torch.cat(biases)] if biases else [])]


class StructuredMatching(PaddedScorer):
    """GSMN's pair scorer, (1) to (5).

    Args:
        num_block: B, which divides D.
        lambda_softmax: inverse temperature of the attention, in both directions.
        is_sparse: changes nothing, as published.
        sides: whose means (5) adds up, "i2t" the regions' and "t2i" the words'; the scorer has the weights of these.

    >>> scorer = StructuredMatching(num_block=4)
    >>> corner, size = torch.rand(2, 2, 36, 2) / 2
    >>> boxes = torch.cat([corner, corner + size], 2)  # left, top, right, bottom
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], bbox=boxes).shape
    torch.Size([2, 3])
    """

    takes_boxes = True
    without_boxes = "without which GSMN has no score"

    def __init__(
        self,
        num_block: int = 16,
        lambda_softmax: float = 20.0,
        is_sparse: bool = False,
        sides: Sequence[Direction] = ("i2t", "t2i"),
    ) -> None:
        super().__init__()
        self.num_block, self.lambda_softmax, self.is_sparse = int(num_block), float(lambda_softmax), bool(is_sparse)
        self.sides = sides
        if "i2t" in sides:
            self.i2t_match_G = _Side("graph_convolution_1", _RegionKernels(self.num_block))
        if "t2i" in sides:
            self.t2i_match_G = _Side("graph_convolution_3", _WordKernels(self.num_block))

    def extra_repr(self) -> str:
        return f"num_block={self.num_block}, lambda_softmax={self.lambda_softmax}, is_sparse={self.is_sparse}"

    def forward(  # type: ignore[override]
        self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor,
        region_lengths: Tensor | None = None, bbox: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Score every image against every caption; arguments as `PaddedScorer.forward`.

        Args:
            bbox: [I, R, 4], the regions' boxes: left, top, right and bottom as parts of the picture.

        Raises:
            ValueError: a shape or length is wrong, or there are no boxes.
        """
        words, cu_seqlens = packed(NAME, cap_emb, cap_lens)
        check_inputs(self, NAME, img_emb, words, cu_seqlens, region_lengths)
        image_state = self.image_state(img_emb, region_lengths, bbox)
        return self.score(image_state, words, cu_seqlens, (), region_lengths)

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None, bbox: Tensor | None = None) -> State:
        """The image [I, R, D] and, for the regions' side, the sums of (4), [I, R, 8]."""
        if image.dim() != 3 or image.shape[2] % self.num_block:
            raise ValueError(
                f"{NAME}: image must be [I, R, D] with D a multiple of num_block = {self.num_block}, "
                f"got {list(image.shape)}"
            )
        region_counts(region_lengths, image, NAME)
        if "i2t" not in self.sides:
            return (image,)
        if bbox is None:
            raise ValueError(
                f"{NAME}: bbox must be {[*image.shape[:2], 4]}, a box for each region, got none; pass bbox= "
                f"(boxes= to matched), or for the images of a split {HOW_BOXES}"
            )
        bbox = checked(NAME, bbox, image, region_lengths).to(image.dtype)
        return image, self.i2t_match_G.graph_convolution_1(bbox, region_lengths)  # type: ignore[operator]

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of the images and captions given."""
        image = image_state[0]
        weights = [x for side in self.sides for x in getattr(self, f"{side}_match_G").stacked()]
        (R, D), per_query = image.shape[1:], self.num_block + 3 * HIDDEN

        def pair_bytes(length: int) -> int:
            return (length + R) * (D + per_query) * 4

        tensors = image, words, *image_state[1:], *weights
        axes = "INI"[: len(image_state) + 1] + "." * len(weights)
        cut = partial(blocks, NAME, axes, pair_bytes, self._block)
        captions = len(cu_seqlens) - 1
        queries = sum({"i2t": captions * R, "t2i": len(words)}[side] for side in self.sides)
        # Autograd records of each query of a pair P, 6 numbers of each of its blocks for the cosine, and y, its product
        # with the share, and tanh; of each affinity 3 numbers, before and after its norm and as a weight, and 3 of each
        # norm; words where a block gathers them, weights, and copies of images without their padding.
        attention = 3 * len(self.sides) * (len(words) + captions) * R
        padded = 0 if region_lengths is None else 4 * image.numel() * lengths(cu_seqlens, words, NAME)
        numbers = len(image) * (queries * (D + 6 * self.num_block + 3 * HIDDEN) + attention) + padded
        numbers += words.numel() + sum(x.numel() for x in weights)
        return _recompute.score(cut, axes, tensors, cu_seqlens, region_lengths, numbers=numbers)

    def _block(self, length, cu_seqlens, region_lengths, image, words, *rest) -> Tensor:
        """Scores of some images with captions of one length."""
        if region_lengths is not None:
            image, real = without_padding(image, region_lengths)
        attend = partial(attended_vectors, image, words, cu_seqlens, scale=self.lambda_softmax)
        found = []
        if "i2t" in self.sides:
            x = self._cosines(attend(direction="i2t", region_lengths=region_lengths), image[:, None])  # [b, c, R, B]
            y = self._read(x, rest[1:6], rest[0][:, None])
            if region_lengths is not None:
                y = y * real[:, None, :, None]
            found.append(mean_over_queries(y, length, "i2t", region_lengths))
        if "t2i" in self.sides:
            y = self._read(self._cosines(attend(region_lengths=region_lengths), words), rest[-6:])
            found.append(mean_over_queries(y, length, "t2i", None))
        return reduce(torch.add, found)[..., 0]

    def _cosines(self, attended: Tensor, query: Tensor) -> Tensor:
        """(1): [..., D] -> [..., B]."""
        return cosine(*(x.unflatten(-1, (self.num_block, -1)) for x in (query, attended)))

    @staticmethod
    def _read(x: Tensor, weights: Sequence[Tensor], share: Tensor | None = None) -> Tensor:
        """(2) or (3), and what (5) averages: [..., B] -> [..., 1]."""
        C, first, first_bias, second, second_bias, *bias = weights
        y = linear(x, C, *bias)
        if share is not None:
            y = (y.unflatten(-1, (KERNELS, WIDTH)) * share[..., None]).flatten(-2)
        return linear(linear(y, first, first_bias).tanh(), second, second_bias)

    def attention(  # type: ignore[override]
        self, image: Tensor, words: Tensor, bbox: Tensor | None = None
    ) -> Attention:
        """`regions` and `words`; `bbox` [R, 4] as in `forward`."""
        weights = {
            "regions": pair_attention(words, image, self.lambda_softmax),
            "words": pair_attention(image, words, self.lambda_softmax),
        }
        score = self(image[None], words[None], [len(words)], bbox=None if bbox is None else bbox[None])
        return Attention(score.item(), weights)
