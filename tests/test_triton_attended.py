"""What the Triton kernels of `attended_vectors` meet beside the shapes of `test_triton_ops`."""

import pytest
import torch
from family_cases import golden
from sgraf_cases import under
from test_attended_vectors import LENGTHS, case
from triton_cases import HALVES, TRITON, check_blocks, placed

import itm_fast
from itm_fast.models import rcar
from itm_fast.ops._attention import DIRECTIONS, NORMS
from itm_fast.testing import op_checks

over_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def check(call, args, device, backend, dtype=torch.float32):
    args = placed(args, device)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@TRITON
@over_directions
def test_shared_queries_and_one_scale(direction, device, backend):
    call, args = case(3, LENGTHS, 6, 16, 5, (6, 1, 4), direction=direction)
    for dtype in (torch.float32, *HALVES[device]):
        check(call, args, device, backend, dtype)
    image, words = placed(args, device)
    edge = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    scale = torch.full((1, 1), 3.0, dtype=image.dtype, device=device)
    options = dict(direction=direction, affinity_norm="none")
    given = [words[None] * 2, image.cos()] if direction == "t2i" else [image * 2, words.cos()]

    def other(image, words, queries, values, scale, backend):
        return itm_fast.attended_vectors(image, words, edge, queries, values, scale=scale, backend=backend, **options)

    check(other, [image, words, *given, scale], device, backend)


@TRITON
@pytest.mark.parametrize("k,norm", [*enumerate(NORMS)])
def test_every_norm(k, norm, device, backend):
    options = dict(direction=DIRECTIONS[k % 2], affinity_norm=norm)
    check(*case(3, LENGTHS, 6, 16, 5, (6, 1, 4), own=True, **options), device, backend)


@TRITON
@over_directions
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_sets_of_several_tiles_and_many_pieces(own, direction, device, backend):
    lengths, R = ((3, 1), 66) if direction == "t2i" else ((34, 1), 3)
    call, args = case(2, lengths, R, 12, 40, own=own, direction=direction)
    if not own:  # one scale, whose gradient is a sum over all pieces
        shared, args = call, [*args, torch.full((1, 1), 4.0, dtype=torch.float64)]

        def call(image, words, scale, backend):
            return shared(image, words, None, None, scale, backend=backend)

    check(call, args, device, backend)
    check_blocks(call, placed(args, device), torch.float32, 2.0**-15, 1e-6)


@TRITON
@over_directions
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_padded_regions_never_leak(own, direction, device, backend):
    counts = (6, 1, 4)
    call, args = case(3, (4, 2), 6, 8, 5, counts, own=own, direction=direction)
    args = placed(args, device, torch.float32)
    want = call(*args, backend=backend)
    spoiled = [args[0], *args[3:4]]  # regions, and what the weights of the regions sum
    if direction == "i2t":
        spoiled = [args[0], *(x.transpose(1, 2) for x in args[2:3])]  # regions, and queries [I, T, R, D]
    for i, n in enumerate(counts):
        for x in spoiled:
            x[i, n:] = float("nan")
    leaves = [x.requires_grad_() for x in args]
    found = call(*leaves, backend=backend)
    torch.testing.assert_close(found, want)
    grad = op_checks.upstream(found)
    if direction == "i2t":
        assert found[1, :, 1:].eq(0).all()
        grad[1, :, 1:] = float("nan")  # of vectors that are zero whatever the inputs
    found.backward(grad)
    assert all(x.grad.isfinite().all() for x in leaves)


@TRITON
def test_published_vectors_of_rcar(device, backend):
    """In float32, whose own loops are off by 1e-6 in scores and by 5e-5 in gradients of the inputs."""
    want = golden("rcar_t2i_rcar2")
    scorer = rcar.RegulatedMatching(64, 32, **under(want, "option/")).eval()
    scorer.load_state_dict(under(want, "param/"))
    names = ("image", "caption", "d_score", "score", "d_image", "d_caption")
    image, caption, d_score, *expected = (want[name].to(device, torch.float32) for name in names)
    with itm_fast.use_backend(backend):
        score = scorer.to(device)(image.requires_grad_(), caption.requires_grad_(), want["lengths"].tolist())
        score.backward(d_score)
    found = (score, image.grad, caption.grad)
    for mine, value, allowed in zip(found, expected, (1e-5, 2e-4, 2e-4), strict=True):
        torch.testing.assert_close(mine, value, rtol=0, atol=allowed * max(1.0, value.abs().max().item()))
