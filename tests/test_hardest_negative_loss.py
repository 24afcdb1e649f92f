"""`hardest_negative_loss`: values, gradients, image ids, and refusals."""

import pytest
import torch

import itm_fast
from itm_fast.testing import op_checks

BACKENDS = op_checks.backends("hardest_negative_loss")
IDS = torch.tensor([0, 0, 1, 2, 2, 3, 4])


PART = torch.tensor([6, 0, 3])  # the captions of three images


def case(B, hardest=True, image_ids=None, positive=None, both=True):
    I = B if positive is None else len(positive)
    score = torch.rand(I, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def call(score, backend):
        return itm_fast.hardest_negative_loss(
            score, hardest=hardest, image_ids=image_ids, positive=positive, both=both, backend=backend
        )

    return call, (score,)


@pytest.mark.parametrize("image_ids", [None, IDS], ids=["diagonal", "image_ids"])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, dtype, hardest, image_ids):
    call, args = case(7, hardest, image_ids)
    op_checks.check_forward(call, args, dtype, backend)
    op_checks.check_gradients(call, args, dtype, backend)


@pytest.mark.parametrize("image_ids", [None, IDS], ids=["diagonal", "image_ids"])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_part_of_a_batch(backend, hardest, both, image_ids):
    call, args = case(7, hardest, image_ids, PART, both)
    op_checks.check_forward(call, args, torch.float64, backend)
    op_checks.check_gradients(call, args, torch.float64, backend)


@pytest.mark.parametrize("image_ids", [None, IDS], ids=["diagonal", "image_ids"])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_parts_add_up_to_the_batch(backend, hardest, image_ids):
    score = torch.rand(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"hardest": hardest, "image_ids": image_ids, "backend": backend}
    whole = itm_fast.hardest_negative_loss(score, **options)
    parts = [
        itm_fast.hardest_negative_loss(scores[rows], positive=rows, both=False, **options)
        for scores in (score, score.t())
        for rows in (torch.tensor([0, 3, 6]), torch.tensor([5, 1]), torch.tensor([2, 4]))
    ]
    torch.testing.assert_close(sum(parts), whole)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(itm_fast.hardest_negative_loss(score[order], positive=order, **options), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    call, args = case(7)
    op_checks.check_forward(call, args, dtype, backend)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradcheck_and_contracts(backend, hardest):
    call, args = case(5, hardest, torch.tensor([0, 1, 1, 2, 3]))
    op_checks.check_gradcheck(call, args, backend)
    op_checks.check_needs(call, args, backend)
    op_checks.check_compile(call, args, backend)
    op_checks.check_deterministic(call, args, backend)
    op_checks.check_strided(call, args, backend)
    op_checks.check_fake_backward("hardest_negative_loss", (args[0].t(), None, None, 0.2, hardest, True), 1, backend)
    given = (args[0][PART[1:]].requires_grad_(), PART[1:], None, 0.2, hardest, True, backend)
    torch.library.opcheck(torch.ops.itm_fast.hardest_negative_loss.default, given)


def test_one_compiled_function_takes_a_margin_that_changes():
    torch.compiler.reset()
    compiled = torch.compile(itm_fast.hardest_negative_loss, fullgraph=True, backend="aot_eager")
    score = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    for margin in (0.2, 0.3, 1, 0.2):
        found = []
        for call in (compiled, itm_fast.hardest_negative_loss):
            leaf = score.clone().requires_grad_()
            loss = call(leaf, margin=margin)
            loss.backward()
            found.append(torch.cat([loss.detach().view(1), leaf.grad.view(-1)]))
        assert torch.equal(*found)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_hand_computed_batch(backend):
    score = torch.tensor([[0.5, 0.4, 0.9], [0.1, 0.8, 0.7], [0.2, 0.3, 0.6]], dtype=torch.float64)

    def loss(**options):
        return itm_fast.hardest_negative_loss(score, margin=0.2, backend=backend, **options).item()

    # rows: 0.6, 0.1, 0; columns: 0, 0, 0.5
    assert loss() == pytest.approx(1.2)
    # rows: 0.1 + 0.6, 0.1, 0; columns: 0, 0, 0.5 + 0.3
    assert loss(hardest=False) == pytest.approx(1.6)
    # captions 0 and 2 are of one image: what is left is 0.1 in row 0, 0.1 in row 1 and 0.3 in column 2
    assert loss(image_ids=torch.tensor([7, 8, 7])) == pytest.approx(0.5)

    # of images 2 and 0 with all captions: the rows as above; of the columns, 0 has no cost and 2 has 0.5
    positive = torch.tensor([2, 0])
    part = itm_fast.hardest_negative_loss(score[positive], margin=0.2, positive=positive, backend=backend)
    assert part.item() == pytest.approx(1.1)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("B", [0, 1])
def test_a_batch_without_negatives_costs_nothing(backend, B):
    score = torch.rand(B, B, requires_grad=True)
    loss = itm_fast.hardest_negative_loss(score, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert score.grad.eq(0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_all_of_one_image_costs_nothing(backend):
    score = torch.rand(4, 4, requires_grad=True)
    for hardest in (True, False):
        loss = itm_fast.hardest_negative_loss(
            score, hardest=hardest, image_ids=torch.zeros(4, dtype=torch.int64), backend=backend
        )
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, score)
        assert grad.eq(0).all()


def test_autocast_computes_in_float32():
    score = torch.rand(4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = itm_fast.hardest_negative_loss(score)
    assert loss.dtype == torch.float32
    loss.backward()
    assert score.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ((torch.zeros(3, 4), {}), ValueError, r"score must be \[B, B\], got \[3, 4\]; .* give positive"),
        ((torch.zeros(3, 3), {"image_ids": torch.arange(4)}), ValueError, r"image_ids must be \[T\] with T = 3"),
        ((torch.zeros(3, 4), {"positive": torch.arange(4)}), ValueError, r"positive must be \[I\] with I = 3"),
        ((torch.zeros(3, 3).long(), {}), TypeError, "score must be float64"),
        ((torch.zeros(3, 3), {"backend": "cpu"}), NotImplementedError, "cpu"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        itm_fast.hardest_negative_loss(arguments[0], **arguments[1])
