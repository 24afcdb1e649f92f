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


@pytest.mark.parametrize("kind, D", [("F16", 200), ("BF16", 64), ("one F16", 264)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_are_accurate(direction, kind, D, case, device):
    image, *rest = case(kind, D, R=36 if D > 64 else 20)
    check(kind, image.nan_to_num(0), *rest, direction=direction)
    counts = used(device)
    assert counts["bank_conflicts"] == 0
    assert counts["group_flops"] == 2 * 4 * 128 * (2 * 288) * -(-D // 64) * 64


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bits_are_those_of_blocks_alone_in_every_order(direction, case, device):
    given = case("F16")
    _cuda.allow_variant(op.OP, given[0].device, torch.float16, _cuda.GENERAL)
    want = run(*given, direction=direction).float()
    assert not want.isnan().any()
    _cuda.allow_variant(op.OP, given[0].device, torch.float16, _cuda.CLUSTERS)
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
