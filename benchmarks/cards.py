"""What a GPU's maker says that it reaches; `benchmarks/traffic.py` holds kernels against it.

Peaks of matrix products are dense, without sparsity, at the boost clock: sustained rates are lower. The makers give no
rate for the L2 cache, so those are others' measurements, and the least certain number of each card.
"""

from __future__ import annotations

from dataclasses import dataclass

PRODUCTS = {  # kind of matrix product -> (the rate that it runs at, how many of them stand for one)
    "float16": ("float16", 1),
    "bfloat16": ("bfloat16", 1),
    "tf32": ("tf32", 1),
    "tf32x3": ("tf32", 3),  # float32's accuracy by three products of TF32 parts
    "float16x3": ("float16", 3),  # the same by three products of float16 parts
    "float64": ("float64", 1),
}


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as its maker sells it.
        arch: of the tiles in kernels/_tiles.py; None where the Triton kernels do not run.
        processors: streaming multiprocessors.
        memory: bytes per second of its memory.
        cache: bytes of its L2 cache.
        cache_rate: bytes per second from L2 to the multiprocessors; see `cache_source`.
        products: operations per second by the rates of `PRODUCTS`, multiply-add = 2.
        mma: share of them that mma.sync reaches; wgmma reaches all.
        clock: Hz of `products`.
        vector: float32 instructions per second outside matrix units: half of the rate that counts a multiply-add as 2.
        source: of all but `cache_rate` and `mma`.
        cache_source: of `cache_rate`.
    """

    name: str
    arch: int | None
    processors: int
    memory: float
    cache: int
    cache_rate: float
    products: dict[str, float]
    mma: float
    clock: float
    vector: float
    source: str
    cache_source: str

    @property
    def shared(self) -> float:
        """Bytes per second of shared memory: 32 banks of 4 bytes a clock in each multiprocessor."""
        return self.processors * 128 * self.clock

    def rate(self, kind: str, by_mma: bool = False) -> float | None:
        """Operations per second of a kind of `PRODUCTS`, of "vector" instructions, or of "ieee", products of float32
        numbers by ordinary multiply-adds, without matrix units; None where the card has no such units."""
        if kind in ("vector", "ieee"):
            return self.vector * (2 if kind == "ieee" else 1)
        unit, times = PRODUCTS[kind]
        peak = self.products.get(unit)
        return None if peak is None else peak / times * (self.mma if by_mma else 1)


_HOPPER = {"float16": 989.4e12, "bfloat16": 989.4e12, "tf32": 494.7e12, "float64": 66.9e12}
# 6 TB/s on an H100 PCIe with 114 multiprocessors (chipsandcheese.com, 2 July 2023: 5.5 to 6)
_HOPPER_RATE = 6.0e12 * 132 / 114
_HOPPER_CACHE = "assumed: 6 TB/s as measured on an H100 PCIe (chipsandcheese.com, 2 July 2023), x 132 / 114 processors"
_HOPPER_MMA = 0.63  # Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499
CARDS = {
    "h100": Card(
        "H100 SXM 80 GB", 90, 132, 3.35e12, 50 << 20, _HOPPER_RATE, _HOPPER, _HOPPER_MMA, 1.83e9, 66.9e12 / 2,
        "NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 Tensor Core GPU Architecture, V1.04", _HOPPER_CACHE,
    ),
    "h200": Card(
        "H200 SXM 141 GB", 90, 132, 4.8e12, 50 << 20, _HOPPER_RATE, _HOPPER, _HOPPER_MMA, 1.83e9, 66.9e12 / 2,
        "NVIDIA H200 Tensor Core GPU data sheet; chip as the H100's", _HOPPER_CACHE,
    ),
    "a100": Card(
        "A100 SXM 80 GB", 80, 108, 2.039e12, 40 << 20, 7.2e12,
        {"float16": 312e12, "bfloat16": 312e12, "tf32": 156e12, "float64": 19.5e12}, 1.0, 1.41e9, 19.5e12 / 2,
        "NVIDIA A100 Tensor Core GPU data sheet; NVIDIA A100 Tensor Core GPU Architecture, V1.0",
        "5,120 bytes a clock by the maker's white paper, at 1.41 GHz: an upper bound",
    ),
    "t4": Card(
        "T4", None, 40, 0.32e12, 4 << 20, 1.27e12, {"float16": 65e12}, 1.0, 1.59e9, 8.1e12 / 2,
        "NVIDIA T4 data sheet; NVIDIA Turing GPU Architecture",
        "measured: Jia et al., Dissecting the NVidia Turing T4 GPU via Microbenchmarking, 2019",
    ),
}  # fmt: skip
