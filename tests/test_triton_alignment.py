"""`hierarchical_alignment_score` on its Triton kernels: what test_triton_ops.py does not ask of every op."""

import pytest
import torch
from itm_fast.kernels import hierarchical_alignment_score as kernels
from test_hierarchical_alignment_score import DIRECTIONS, case
from triton_cases import TRITON, Scratch, placed, unless

import itm_fast
from itm_fast import _backends, _triton
from itm_fast.testing import op_checks

DTYPES = [torch.float32, torch.float16]
GATES = ["scalar", "vector"]
over_gates = pytest.mark.parametrize("gate", GATES)
over_directions = pytest.mark.parametrize("direction", DIRECTIONS)
pytestmark = pytest.mark.slow
interpreted = unless("triton", "cpu")
COUNTS = (13, 17, 5, 33, 16, 32, 3, 70, 9)  # all classes of length


@TRITON
@over_gates
@pytest.mark.parametrize("direction, pool", [("t2i", "sum"), ("i2t", "mean"), ("both", "mean"), ("both", "sum")])
def test_every_direction_gate_and_pool(gate, direction, pool, device, backend):
    options = dict(gate=gate, direction=direction, pool=pool, local_mix=0.8, global_mix=0.1)
    call, args = case(3, (4, 1, 3, 4, 18), 6, 16, (6, 1, 4), **options)
    args = placed(args, device)
    for dtype in DTYPES:
        op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, dtype, backend)


@TRITON
@over_gates
@over_directions
@pytest.mark.parametrize("regions", [9, 70], ids=["R9", "R70"])
def test_pairs_of_every_size(gate, direction, regions, device, backend):
    counts = (5, 40, 17, 100) if regions == 9 else (5, 40, 100)
    call, args = case(2, counts, regions, 40, (regions, 4), gate=gate, direction=direction)
    op_checks.check_forward(call, placed(args, device), torch.float32, backend)


@TRITON
@over_directions
def test_vectors_that_cancel_keep_their_accuracy(direction, device, backend):
    """Rows that nearly cancel, and keys that are alike: what is attended to is far shorter than its terms."""
    call, args = case(2, (6, 20), R=6, D=32, direction=direction)
    image, image_key, _, words, word_key = args[:5]
    image[:, 3:] = -image[:, :3] + 1e-3 * image[:, 3:]
    image_key[:], word_key[:] = image_key[:, :1], word_key[:1]
    words[3:6], words[16:] = -words[:3] + 1e-3 * words[3:6], -words[6:16] + 1e-3 * words[16:]
    op_checks.check_forward(call, placed(args, device), torch.float32, backend)


@TRITON
@over_gates
@over_directions
def test_what_is_beside_a_pair_never_leaks(gate, direction, device, backend):
    call, args = case(3, COUNTS, 6, 16, (6, 2, 5), gate=gate, direction=direction)
    args = placed(args, device, torch.float32)
    want = call(*args, backend=backend)
    # A caption, what it adds to gates, an image, and regions that do not exist.
    args[3][13:30], args[5][35:40] = float("nan"), float("nan")
    args[0][1] = float("inf")
    for padded in args[:3]:
        padded[2, 5:] = float("nan")
    found = call(*args, backend=backend)
    kept = [t for t in range(len(COUNTS)) if t not in (1, 3)]
    assert torch.equal(found[::2, kept], want[::2, kept])
    assert found[:, 1].isnan().all()
    assert found[:, 3].isnan().all()
    assert found[1].isnan().all()


@interpreted
@over_gates
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_has_the_same_bits_alone_in_any_order_and_in_any_block(gate, dtype, monkeypatch, as_matrix_units_add):
    call, args = case(3, COUNTS, 6, 24, gate=gate)
    args = [a.to(dtype) for a in args]
    whole = call(*args, backend="triton")
    images, words, pools = args[:3], [x.split(COUNTS) for x in args[3:6]], args[6:]
    for t, n in enumerate(COUNTS):
        alone, _ = case(1, (n,), 6, 24, gate=gate)
        found = alone(*(x[1:2].contiguous() for x in images), *(x[t] for x in words), *pools, backend="triton")
        assert torch.equal(found[0, 0], whole[1, t])
    order = torch.randperm(len(COUNTS), generator=torch.Generator().manual_seed(1)).tolist()
    turned, _ = case(3, [COUNTS[t] for t in order], 6, 24, gate=gate)
    found = turned(
        *(x.flip(0) for x in images), *(torch.cat([x[t] for t in order]) for x in words), *pools, backend="triton"
    )
    assert torch.equal(found, whole[:, order].flip(0))
    monkeypatch.setattr(kernels, "WINDOW", 32)
    assert torch.equal(call(*args, backend="triton"), whole)
    with itm_fast.workspace(1e-5):
        assert torch.equal(call(*args, backend="triton"), whole)


@interpreted
@over_gates
@pytest.mark.parametrize(
    "gib, shape", [(2.0**-15, (24, (13, 9), 9)), (2.0**-14, (7, (60, 5, 40, 8, 60, 60), 7))], ids=["blocks", "windows"]
)
def test_scratch_is_bounded(gate, gib, shape, monkeypatch):
    call, args = case(*shape, 32, gate=gate)
    args = [a.float() for a in args]
    # the rows' numbers are as many as the inputs' rows
    scratch = Scratch(monkeypatch, lambda tensor: tensor.shape[-1:] == (4,))
    whole = call(*args, backend="triton")
    with itm_fast.workspace(gib):
        scratch.watch(torch, "empty", "empty_like")
        torch.testing.assert_close(call(*args, backend="triton"), whole)
    assert gib * 2**30 / 4 < scratch.peak <= gib * 2**30


@interpreted
def test_bounds_are_checked_where_there_is_no_image():
    call, args = case(1, (3, 2), 6)
    args = [a.float() for a in args]
    images, words, pools = [a[:0] for a in args[:3]], args[3:6], args[6:]
    assert call(*images, *words, *pools, backend="triton").shape == (0, 2)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(*images, *(a[:4] for a in words), *pools, backend="triton")


@interpreted
def test_pairs_that_fit_no_tile_are_refused():
    call, args = case(1, (3, 129), 2, 4)
    with pytest.raises(ValueError, match=r'caption 1 has 129 words, and .* at most 128; use backend="torch"'):
        call(*(a.float() for a in args), backend="triton")
    call, args = case(1, (3,), 129, 4)
    with pytest.raises(NotImplementedError, match="triton: image has 129 regions, and its kernels take at most 128"):
        call(*(a.float() for a in args), backend="triton")


def test_images_of_too_many_regions_are_left_to_the_next_backend(monkeypatch):
    monkeypatch.setattr(_backends, "_cannot_run", lambda name, device, dtype: None if name != "cpu" else "not here")
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_backends, "_told", set())
    cuda, reason = torch.device("cuda"), "image has 129 regions"
    with pytest.warns(UserWarning, match=f"slower torch backend, as its Triton kernels cannot run: {reason}"):
        name = _backends.resolve("hierarchical_alignment_score", None, cuda, torch.float32, lambda backend: reason)
    assert name == "torch"
