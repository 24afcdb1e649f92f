"""The structs that C++ is called with: both sides have the same ones, and a library with others is refused."""

import ctypes

import pytest
import torch
from cpu_cases import needs_cpu

import itm_fast
from itm_fast import _native, ops
from itm_fast.ops import _calls, _cpu_calls
from itm_fast.ops._declare import CPU_ONLY, DECLARED, Choice
from itm_fast.testing import inputs

COMMAND = r"`python -m itm_fast\.ops\._calls`"
CALLED = {op.name: op for op in _calls.called()}


def test_the_headers_are_what_the_declarations_give():
    csrc = _native.csrc_dir()
    expected = _calls.headers()
    assert {name: (csrc / name).read_text() for name in expected} == expected, f"run {COMMAND}"
    assert {f"cpu/calls/{file.name}" for file in (csrc / "cpu" / "calls").iterdir()} == {*expected} - {"cuda/choices.h"}


def test_every_op_with_kernels_has_a_struct():
    offered = {op for op in ops.__all__ if "cpu" in DECLARED[op].offered}
    assert set(CALLED) == offered - {"global_local_score"} | set(CPU_ONLY)
    assert set(_cpu_calls.BFLOAT16) | set(_cpu_calls.WRITTEN) <= set(CALLED)
    assert set(_cpu_calls.IN_FLOAT64) | set(_cpu_calls.TOGETHER) <= set(CALLED)


@pytest.mark.parametrize("name", CALLED)
def test_fields_lie_eight_bytes_apart(name):
    struct = _calls.struct(CALLED[name])
    fields = [field for field, _ in struct._fields_]
    assert [getattr(struct, field).offset for field in fields] == [8 * k for k in range(len(fields))]
    assert ctypes.sizeof(struct) == 8 * len(fields)
    assert len(set(fields)) == len(fields)
    assert set(CALLED[name].places) <= set(fields)


@pytest.mark.parametrize("name", CALLED)
def test_enumerations_have_every_choice(name):
    for argument in CALLED[name].arguments:
        if isinstance(argument, Choice):
            assert set(argument.choices) <= set(_calls.ENUMS[argument.enum])


@needs_cpu
def test_a_library_with_other_structs_is_refused(monkeypatch):
    features = inputs(2, (3, 2), 4, 8)
    itm_fast.cross_attention_score(*features, backend="cpu")
    monkeypatch.setattr(_calls, "digest", lambda: "0" * 16)
    _cpu_calls._same_structs.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"does not follow the ops' declarations: run {COMMAND}"):
            itm_fast.cross_attention_score(*features, backend="cpu")
    finally:
        _cpu_calls._same_structs.cache_clear()


@needs_cpu
def test_tensors_elsewhere_are_not_handed_over():
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8)
    call = _cpu_calls.implementation("global_local_score")
    with pytest.raises(AssertionError, match=r"^global_local_score: tensors must be in host memory$"):
        call.forward(image[:, 0], words.to("meta"), cu_seqlens, 1.0)


@needs_cpu
def test_what_is_kept_for_backward_may_be_strided():
    """As a hook of saved tensors may give it back."""
    call = _cpu_calls.implementation("similarity_nodes")
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8)
    args = [image, image[:, 0], words, words[:2], torch.randn(4, 8), torch.zeros(4), torch.randn(4, 8), torch.zeros(4)]
    args = [*args, cu_seqlens, None, 9.0]
    results = call.forward(*args)
    grad = torch.ones_like(results[0])
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in results]
    expected, found = (call.backward(grad, [True] * 8, *args, results=kept) for kept in (results, strided))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_cpu
def test_bounds_and_options_are_checked_where_the_public_function_is_passed_by():
    context = torch.ops.itm_fast.similarity_context.default
    overall, local, assignment = torch.rand(2, 3, 4), torch.rand(2, 5, 4), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[T\+1\] with T = 3, got \[3\]"):
        context(overall, local, assignment, torch.tensor([0, 3, 5]), [2], "cpu")
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8)
    score = torch.ops.itm_fast.cross_attention_score.default
    with pytest.raises(ValueError, match=r"affinity_norm must be one of softmax, .*, got 'cosine'"):
        score(image, words, cu_seqlens, None, "t2i", "cosine", 9.0, "lse", 6.0, "softmax", 0.0, "cosine", "cpu")


@needs_cpu
def test_a_default_device_changes_nothing():
    features = inputs(2, (3, 2), 4, 8)
    call = _cpu_calls.implementation("cross_attention_score")
    options = None, "t2i", "clipped_l2norm", 9.0, "lse", 6.0, "softmax", 0.0, "cosine"
    with torch.device("meta"):
        score = call.forward(*features, *options)
        gradients = call.backward(torch.ones(2, 2, device="cpu"), [True, True], *features, *options)
    assert torch.equal(score, call.forward(*features, *options))
    assert all(x.is_cpu for x in gradients)


@needs_cpu
@pytest.mark.parametrize("wanted", range(7))
def test_the_graphs_gradients_are_the_same_alone_as_together(wanted):
    """C++ makes those of the weights all together; the key bias, whose gradient is zero, gets none of its own."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 5, 4), *[(2, 4, 4), (2, 4)] * 3]
    args = [torch.randn(shape, generator=generator) for shape in shapes]
    bounds, grad = torch.tensor([0, 3, 5]), torch.ones(2, 2, 4)
    call = _cpu_calls.implementation("similarity_graph")
    every = call.backward(grad, [True] * 7, *args, bounds)
    (alone,) = call.backward(grad, [k == wanted for k in range(7)], *args, bounds)
    assert torch.equal(alone, every[wanted])
    assert torch.equal(every[4], torch.zeros(2, 4))
