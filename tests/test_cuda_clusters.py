"""SCAN's kernels whose blocks share the regions in clusters (csrc/cuda/affinity.h), emulated on the CPU."""

import pytest
import torch
from cuda_emulated import device, emulated
from test_cuda_emulated import DIRECTIONS, assert_same_bits, check, choose, drawn, dtype_of, run

from itm_fast import _cuda
from itm_fast.ops._cuda import cross_attention_score as op

__all__ = ["device", "emulated"]  # fixtures
# More images than a group has; three tiles of captions, so that a cluster has a block without one.
LENGTHS = (127, 12, 1, 7, 30, 5, 2, 9, 120, 3)
REGIONS = (36, 1, 20, 36, 7, 36, 36, 2, 30)


@pytest.fixture
def case(device, monkeypatch):
    """Makes the kind of products, the arguments of a call, and NaN of regions that must not be read."""
    device.capability = _cuda.SPECIFIC

    def make(kind, D=200, R=36):
        choose(kind, monkeypatch)
        image, words, edge = drawn(len(REGIONS), LENGTHS, R, D, dtype_of(kind))
        counts = torch.tensor(REGIONS).clamp(max=R)
        for i, n in enumerate(counts):
            image[i, n:] = torch.nan
        return image, words, edge, counts

    return make


def used(device):
    kernel, counts = device.launches[-1]
    assert kernel.cluster == 2
    return counts


@pytest.mark.parametrize("kind, D", [("F16", 200), ("BF16", 64), ("one F16", 264), ("F16X3", 72)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_are_accurate(direction, kind, D, case, device):
    image, *rest = case(kind, D, R=36 if D > 64 else 20)
    check(kind, image.nan_to_num(0), *rest, direction=direction)
    counts = used(device)
    assert counts["bank_conflicts"] == 0
    products, numbers = (3, 32) if kind == "F16X3" else (1, 64)  # of a number, and a stage's
    assert counts["group_flops"] == 2 * 4 * 128 * (2 * 288) * products * -(-D // numbers) * numbers


@pytest.mark.parametrize("kind", ["F16", "F16X3"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bits_are_those_of_blocks_alone_in_every_order(direction, kind, case, device):
    image, words, *rest = case(kind, D=200 if kind == "F16" else 104)
    if kind == "F16X3":  # rows that two halves do not hold, in one image and one caption
        for row in (image[2, 3], words[-1]):
            row *= 2.0 ** torch.arange(104.0).remainder(30)
    given = image, words, *rest
    _cuda.allow_variant(op.OP, image.device, image.dtype, _cuda.GENERAL)
    want = run(*given, direction=direction).float()
    assert not want.isnan().any()
    _cuda.allow_variant(op.OP, image.device, image.dtype, _cuda.CLUSTERS)
    for device.order in range(4):
        found = run(*given, direction=direction).float()
        used(device)
        assert_same_bits(found, want)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_of_blocks_that_have_waited_in_vain_are_nan_and_said_to_be(direction, case, device, emulated):
    given = case("F16", D=264)
    want = run(*given, direction=direction).float()
    emulated.lose(7)
    found = run(*given, direction=direction).float()
    assert found.isnan().any()
    assert_same_bits(found[~found.isnan()], want[~found.isnan()])
    with pytest.warns(UserWarning, match="waited in vain for each other"):
        assert_same_bits(run(*given, direction=direction).float(), want)
    assert device.launches[-1][0].cluster == 1
