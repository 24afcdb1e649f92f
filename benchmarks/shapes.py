"""Named workloads and their source.

Sizes: R 36 regions (bottom-up-attention features), D 1024, S 256: the published settings of SCAN and SGRAF. Caption
lengths: the token histograms of COCO's and Flickr30K's test splits (itm_fast/evaluation/workloads.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.testing import inputs


@dataclass(frozen=True)
class Shape:
    """A block of a workload: some images, and captions drawn evenly from its length distribution.

    Attributes:
        workload: name in `WORKLOADS`, whose whole size a block stands for.
        images: I of the block.
        captions: T of the block.
    """

    workload: str
    images: int
    captions: int

    @property
    def lengths(self) -> list[int]:
        """Words per caption, in an order that mixes short and long."""
        whole = WORKLOADS[self.workload].lengths
        picked = whole[((np.arange(self.captions) + 0.5) * len(whole) / self.captions).astype(int)]
        return np.random.default_rng(0).permutation(picked).tolist()

    @property
    def pairs(self) -> int:
        return self.images * self.captions

    def features(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """image [I, R, D], words [N, D] and cu_seqlens [T + 1], float32 unit rows."""
        whole = WORKLOADS[self.workload]
        return inputs(self.images, self.lengths, whole.regions, whole.dim, device=device, dtype=torch.float32)


SHAPES = {
    "coco-eval-5k": Shape("coco-eval-5k", 128, 512),  # cut to a block that takes seconds
    "f30k-eval-1k": Shape("f30k-eval-1k", 128, 512),
    "coco-train-b128": Shape("coco-eval-5k", 128, 128),
    "quick": Shape("coco-eval-5k", 8, 12),
}


def needed_flops(model: str, shape: Shape) -> float:
    """Floating-point operations that the pairs of a block need, multiply-add = 2.

    Affinity V T^T; then SCAN's cosines from the Gram form, or for SGR and SAF the attended vector and W (P - t)^2,
    the global similarity, and the head: SGR with W_q^T W_k folded and its last step at node 0 only.
    """
    whole = WORKLOADS[shape.workload]
    R, D, S, K = whole.regions, whole.dim, whole.similarity, 3
    total = 0.0
    for L in shape.lengths:
        total += 2 * R * L * D
        if model in ("scan-t2i", "scan-i2t"):
            X = R if model == "scan-t2i" else L
            total += 2 * R * L * X + 4 * R * L
            continue
        n = L + 1
        total += 2 * R * L * D + 2 * R * R * L + 2 * n * D * S
        if model == "sgr":
            step = 4 * n * S * S + 4 * n * n * S
            total += (K - 1) * step + 4 * S * S + 4 * n * S
        else:
            total += 4 * n * S
    return total * shape.images


def state_flops(model: str, shape: Shape) -> float:
    """Operations of a block that depend on one image or one caption alone: SGRAF's global vectors (VisualSA, TextSA).

    Over a whole data set they are negligible against those of the pairs; in a block they are not.
    """
    if model.startswith("scan"):
        return 0.0
    whole = WORKLOADS[shape.workload]
    items = [whole.regions] * shape.images + shape.lengths
    return float(sum(2 * (n + 1) * whole.dim**2 for n in items))
