"""What the Triton kernels of cross-attention meet beside the shapes of `test_triton_ops`."""

import pytest
import test_cross_attention_score
import test_cross_attention_similarity
import torch
from itm_fast.kernels import _launch, _tiles
from triton_cases import TRITON, placed

import itm_fast
from itm_fast.ops._attention import DIRECTIONS, POOLS
from itm_fast.testing import inputs, op_checks

# Regions of three tiles, a caption of two and one of a word; S beyond a tile.
LARGE = {
    "score": (test_cross_attention_score, (2, (40, 1), 150, 20)),
    "similarity": (test_cross_attention_similarity, (2, (40, 1), 150, 20, 300)),
}
over_directions = pytest.mark.parametrize("direction", DIRECTIONS)


@TRITON
@over_directions
@pytest.mark.parametrize("op", LARGE)
def test_sets_larger_than_a_tile(op, direction, device, backend):
    module, shape = LARGE[op]
    counts = torch.tensor([150, 70])
    for norm, region_lengths in (("clipped_l2norm", None), ("softmax", counts)):
        call, args = module.case(*shape, region_lengths, direction=direction, affinity_norm=norm)
        args = placed(args, device)
        op_checks.check_forward(call, args, torch.float32, backend)
        op_checks.check_gradients(call, args, torch.float32, backend)


@TRITON
@over_directions
@pytest.mark.parametrize("op", LARGE)
def test_gradients_of_many_pieces_are_those_of_one(op, direction, device, backend):
    module = LARGE[op][0]
    shape = (5, (13, 1, 4, 4, 7), 9, 17) + ((6,) if op == "similarity" else ())
    call, args = module.case(*shape, direction=direction)
    args = placed(args, device, torch.float32)
    whole = op_checks.gradients(call, args, torch.float32, backend, torch.float32)
    with itm_fast.workspace(2.0**-15):
        pieces = op_checks.gradients(call, args, torch.float32, backend, torch.float32)
    largest = max(w.abs().max().item() for w in whole)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * largest)


def cancelling(contexts, queries, D, direction):
    """Contexts in opposite pairs, nearly orthogonal to all queries, so that P is a thousandth of them."""
    lengths = (queries,) * 3 if direction == "i2t" else (8, 6, 8)
    call, args = test_cross_attention_similarity.case(
        3, lengths, contexts, D, 16, direction=direction, affinity_norm="none"
    )
    image, words = args[:2]
    image[..., : D // 2] = 0
    words[..., D // 2 :] = 0
    context = image if direction == "t2i" else words
    context[..., 1::2, :] = -context[..., ::2, :] + 1e-3 * context[..., 1::2, :]
    return call, args


@TRITON
@over_directions
@pytest.mark.parametrize("contexts", [8, 80], ids=["one-tile", "tiles"])
def test_attended_vectors_that_cancel(contexts, direction, device, backend):
    call, args = cancelling(contexts, 8 if contexts == 8 else 40, 48, direction)
    args = placed(args, device, torch.float32)
    # P is 1e-3 of x or less, so float32's rounding of x is 1e-4 of P; the Gram form alone would leave one digit of it.
    op_checks.check_forward(call, args, torch.float32, backend)


@TRITON
def test_opposite_regions_cancel_without_losing_the_score(device, backend):
    generator = torch.Generator().manual_seed(0)
    v, w = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator, dtype=torch.float64), dim=-1)
    image = torch.nn.functional.normalize(torch.stack([v, -v + 1e-4 * w]), dim=-1)[None].float()
    words = (1e-3 * torch.randn(2, 32, generator=generator, dtype=torch.float64)).float()

    def call(image, words, backend):
        edge = torch.tensor([0, 2], device=image.device)
        return itm_fast.cross_attention_score(
            image, words, edge, affinity_norm="none", scale=1e-3, pool="mean", backend=backend
        )

    args = placed([image, words], device)
    op_checks.check_forward(call, args, torch.float32, backend)
    op_checks.check_gradients(call, args, torch.float32, backend)


@TRITON
@over_directions
@pytest.mark.parametrize("pool", POOLS)
def test_nan_in_a_pair_reaches_no_other_pair(pool, direction, device, backend):
    image, words, cu_seqlens = inputs(3, (4, 2, 5), 6, 16, device=device)
    options = dict(direction=direction, pool=pool, backend=backend)
    want = itm_fast.cross_attention_score(image, words, cu_seqlens, **options)
    image[1, 2, 3] = float("nan")
    words[5, 0] = float("nan")
    found = itm_fast.cross_attention_score(image, words, cu_seqlens, **options)
    spoilt = torch.zeros_like(found, dtype=torch.bool)
    spoilt[1] = spoilt[:, 1] = True
    assert found[spoilt].isnan().all()
    torch.testing.assert_close(found[~spoilt], want[~spoilt])


@TRITON
@over_directions
def test_nan_in_a_similarity_reaches_no_other_pair(direction, device, backend):
    call, args = test_cross_attention_similarity.case(3, (4, 2, 5), 6, 16, 8, direction=direction)
    args = placed(args, device, torch.float32)
    want = call(*args, backend)
    args[0][1, 2, 3] = float("nan")
    args[1][5, 0] = float("nan")
    found = call(*args, backend)
    kept = [slice(0, 4), slice(6, 11)] if direction == "t2i" else [slice(0, 1), slice(2, 3)]
    for i in (0, 2):
        for part in kept:
            torch.testing.assert_close(found[i, part], want[i, part])


@TRITON
@over_directions
def test_zero_features_give_finite_results_and_gradients(direction, device, backend):
    zeros = [torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(6)]
    image, words, weight, bias = (x.to(device).requires_grad_() for x in zeros)
    edge = torch.tensor([0, 2, 5], device=device)
    options = dict(direction=direction, backend=backend)
    score = itm_fast.cross_attention_score(image, words, edge, **options)
    similar = itm_fast.cross_attention_similarity(image, words, edge, weight, bias, **options)
    (score.sum() + similar.sum()).backward()
    for x in (score, similar, *(a.grad for a in (image, words, weight, bias))):
        assert x.isfinite().all()


@TRITON
def test_counts_of_regions_beyond_the_images_are_refused(device, backend):
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8, device=device)
    for counts in ([4, 5], [0, 4]):
        with pytest.raises(ValueError, match=r"region_lengths must lie in 1\.\.4 \(R\), got"):
            itm_fast.cross_attention_score(
                image, words, cu_seqlens, region_lengths=torch.tensor(counts, device=device), backend=backend
            )


@TRITON
def test_lengths_that_are_not_contiguous(device, backend):
    wide = torch.tensor([[0, 9], [2, 9], [5, 9]], dtype=torch.int32, device=device)
    image, words = torch.randn(2, 3, 16, device=device), torch.randn(5, 16, device=device)
    counts = torch.tensor(2, dtype=torch.int32, device=device).expand(2)
    found, want = (
        itm_fast.cross_attention_score(image, words, wide[:, 0], region_lengths=counts, backend=name)
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_leave_few_processors_idle(dtype):
    query, context = (_launch.singles(torch.empty(rows, 1, dtype=dtype)) for rows in (20000, 12000))
    tile = _tiles.affinity(dtype, 90, _tiles.products(dtype))
    pieces = list(_launch.pieces(query, context, 2, 1, 2 << 30, _tiles.PIECE))
    assert sum((p.q.stop - p.q.start) * (p.x.stop - p.x.start) for p in pieces) == 20000 * 12000
    for piece in pieces:
        if piece.q.stop < 20000 and piece.x.stop < 12000:  # the last ones are what is left
            rows, columns = piece.q.stop - piece.q.start, piece.x.stop - piece.x.start
            tiles = -(-rows // tile["BLOCK_M"]) * -(-columns // tile["BLOCK_N"])
            assert tiles / (132 * -(-tiles // 132)) > 0.95
            assert rows * columns > 0.8 * _tiles.PIECE
