"""Ops in CUDA C++ the whole way without a GPU: choice, check of first use, plan, argument, the launch through a library
that stands in for the driver, the emulated kernel, and the backward pass of another backend."""

import contextlib
import ctypes
import re
import warnings
import weakref
from functools import partial
from importlib import import_module
from unittest.mock import Mock

import cuda_stub
import pytest
import torch
from cuda_emulated import emulated
from torch.utils._python_dispatch import TorchDispatchMode

import itm_fast
from itm_fast import _backends, _cuda
from itm_fast.ops import _examples as examples
from itm_fast.ops import _first_use
from itm_fast.ops._cuda import _blocks, _pairs, cross_attention_score, similarity_score
from itm_fast.ops._declare import DECLARED

__all__ = ["emulated"]
pytestmark = pytest.mark.slow  # compiles the kernels for the CPU

OPS = [op for op in sorted(_backends.OFFERS) if "cuda" in _backends.OFFERS[op]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZE = examples.Size(3, (13, 2), 36, 64, 64, 2)  # R, D and S that all kernels take
CPU = torch.device("cpu")


@pytest.fixture
def gpu(emulated, monkeypatch):
    """A process that sees GPUs, on which no op has run."""
    monkeypatch.setattr(_first_use, "_verdicts", {})
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setattr(_pairs, "COMPARED", _pairs.SIMILARITIES)
    monkeypatch.setattr(_cuda, "_variants", {})
    monkeypatch.setattr(_cuda, "_gave_up", {})
    monkeypatch.setattr(_cuda, "_without_clusters", set())
    monkeypatch.setattr(examples, "SMALL", SIZE)
    with cuda_stub.installed(emulated.run, order=3) as seen:
        yield seen


class Memory(TorchDispatchMode):
    """Bytes of tensors that live at a time: `peak` of what was made since."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for given in args:
            if isinstance(given, torch.Tensor):  # made before, unless it is known
                self.known.setdefault(given.untyped_storage()._cdata, given)
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known[key] = None
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key, size):
        del self.known[key]
        self.live -= size


def call(op, dtype=torch.float32, backend=None, **options):
    moved = [a.to(dtype) if a.is_floating_point() else a for a in examples.example(op, SIZE)]
    return getattr(itm_fast, op)(*moved, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients_pass_the_check_of_first_use(op, dtype, gpu):
    for precision in ("highest", "high"):
        try:
            torch.set_float32_matmul_precision(precision)
            for way in examples.ways(op):
                assert examples.problem(op, "cuda", CPU, dtype, True, **way) is None
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_kernels_where_triton_cannot_run(op, gpu):
    gpu.capability = (7, 5)
    with _backends.recorded() as ran:
        result = call(op)
    assert ran == {op: "cuda"}
    torch.testing.assert_close(result, call(op, backend="reference"), rtol=0, atol=1e-5)
    assert itm_fast.why_not("cuda", "cpu") is None
    with pytest.raises(NotImplementedError, match=r"cuda: a GPU of compute capability 7\.5 cannot multiply bf"):
        call(op, torch.bfloat16, "cuda")
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels .* take no float64; torch and reference do"):
        call(op, torch.float64, "cuda")


@pytest.mark.parametrize("head", ["graph", "filter"])
@pytest.mark.parametrize("wrong", ["writes nothing", "differs", "waits in vain"])
def test_less_special_kernels_take_over_where_those_for_one_gpu_fail(wrong, head, gpu, emulated, monkeypatch):
    op, variants, half = f"similarity_{head}_score", [], torch.float16
    real = similarity_score.Graph if head == "graph" else similarity_score.Filter

    def run(name, address, *given):
        groups = name.endswith((", false, 128>", ", true, 128>"))
        variants.append(_cuda.CLUSTERS if "_in_clusters" in name else _cuda.GROUPS if groups else _cuda.GENERAL)
        if wrong == "waits in vain" and variants[-1] == _cuda.CLUSTERS:
            emulated.lose(1)
        if variants[-1] and wrong == "writes nothing":
            return
        emulated.run(name, address, *given)
        if variants[-1] and wrong == "differs":  # by less than the comparison with the reference allows
            score = ctypes.cast(real.from_address(address).score, ctypes.POINTER(ctypes.c_uint16))
            score[0] += 5

    want = call(op, half, "torch")
    with cuda_stub.installed(run), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = call(op, half, "cuda")
    said = [str(warning.message) for warning in told]
    assert "without clusters of blocks" in said[0]
    assert re.search("off by .* of the others" if wrong == "differs" else "off by nan", said[0])
    last = _cuda.GROUPS if wrong == "waits in vain" else _cuda.GENERAL
    assert any("without the instructions of this GPU alone" in message for message in said) == (last == _cuda.GENERAL)
    assert _cuda.CLUSTERS in variants
    assert last == max(variants[-3:])
    torch.testing.assert_close(found, want, rtol=0, atol=2e-3)
    if wrong == "waits in vain":  # in the check alone: no score that was returned is in doubt
        variants.clear()
        with cuda_stub.installed(run), warnings.catch_warnings():
            warnings.filterwarnings("error", "thread blocks .* waited in vain")
            call(op, torch.bfloat16, "cuda")
        assert max(variants) == _cuda.GROUPS
        assert not _cuda.cluster_fault(CPU)


def test_the_kernels_of_each_direction_are_compared_with_the_reference(gpu, emulated):
    def run(name, *given):
        if "scan_i2t" not in name:
            emulated.run(name, *given)

    failed = "cross_attention_score with direction 'i2t' in float16 failed its check on cpu .* a result is off by nan"
    with cuda_stub.installed(run):
        call("cross_attention_score", torch.float16, "cuda", direction="t2i")
        with pytest.raises(NotImplementedError, match=failed):
            call("cross_attention_score", torch.float16, "cuda", direction="i2t")


@pytest.mark.parametrize("dtype, wrong", [(torch.float16, 0.01), (torch.float32, 1e-4)], ids=str)
def test_the_clusters_of_both_directions_are_compared(gpu, emulated, dtype, wrong):
    """In float32 also with those whose error is that of products without second halves."""

    launched = []

    def run(name, address, *given):
        launched.append(name)
        emulated.run(name, address, *given)
        if "scan_i2t_in_clusters" in name:  # off by more than rounding
            scan = cross_attention_score.Scan.from_address(address)
            ctypes.cast(scan.score, ctypes.POINTER(ctypes.c_float))[0] += wrong

    op = "cross_attention_score"
    with cuda_stub.installed(run):
        call(op, dtype, "cuda")
        assert any("scan_t2i_in_clusters" in name for name in launched)
        assert not any("scan_i2t" in name for name in launched)  # whose first call compares them
        with pytest.warns(UserWarning, match="of the others.* without clusters of blocks"):
            call(op, dtype, "cuda", direction="i2t")
        assert any("scan_i2t_in_clusters" in name for name in launched)
        launched.clear()
        for direction in ("t2i", "i2t"):
            call(op, dtype, "cuda", direction=direction)
    assert launched
    assert not any("in_clusters" in name for name in launched)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:.*without (the instructions of this GPU alone|clusters)")
def test_a_kernel_that_writes_nothing_is_put_aside(op, gpu):
    failed = rf"cuda: {op} in float32 failed its check on cpu \(cpu, NVRTC 13\.5\): a result is off by nan"
    with cuda_stub.installed(lambda *_: None), _backends.recorded() as ran:
        assert call(op).isfinite().all()
        with pytest.raises(NotImplementedError, match=failed):
            call(op, backend="cuda")
    assert "cuda" not in ran[op]


@pytest.mark.parametrize("op", OPS)
def test_a_graph_is_captured_once_the_kernels_are_loaded(op, gpu, monkeypatch):
    monkeypatch.setattr(_first_use, "capturing", lambda device: gpu.capturing)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"is not loaded on cpu yet, .* call the op once before the capture"):
        call(op, backend="cuda")
    gpu.capturing = False
    want = call(op, backend="cuda")
    gpu.capturing = True
    assert torch.equal(call(op, backend="cuda"), want)


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_call_launches_the_kernels(op, gpu):
    torch.compiler.reset()
    args = [a.float() if a.is_floating_point() else a for a in examples.example(op, SIZE)]
    run = torch.compile(lambda *a: getattr(itm_fast, op)(*a, backend="cuda"), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*args), call(op, backend="cuda"))


@pytest.mark.parametrize("op", OPS)
def test_autocast_chooses_the_kernels_dtype(op, gpu):
    with torch.autocast("cpu", torch.bfloat16):
        result = call(op, backend="cuda")
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, call(op, torch.bfloat16, "cuda"))


RAGGED = {"region_lengths": torch.tensor([36, 1, 20, 36, 7, 36, 36, 2, 36, 30, 36, 11], dtype=torch.int32)}


@pytest.mark.parametrize(
    "dtype,strided,ragged",
    [(torch.float32, False, True), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
)
@pytest.mark.parametrize("op,options", [*((op, {}) for op in OPS), ("cross_attention_score", {"direction": "i2t"})])
def test_scratch_is_bounded(op, options, dtype, strided, ragged, gpu, monkeypatch):
    module = import_module(f"itm_fast.ops._cuda.{DECLARED[op].stem}")
    name = op if hasattr(module, op) else "forward"
    forward, watched, part = getattr(module, name), [], Mock(wraps=_blocks.part)

    def watch(*args):
        with contextlib.nullcontext() if watched else Memory() as memory:
            watched.append(memory)
            return forward(*args)

    given = examples.example(op, examples.Size(12, (9, 14, 3) * 4, 36, 256, 64, 2))
    given = [a.to(dtype) if a.is_floating_point() else a for a in given]
    run = partial(getattr(itm_fast, op), backend="cuda", **options, **(RAGGED if ragged else {}))
    with torch.no_grad():
        whole = run(*given)
        if strided:  # rows that have to be copied
            given[:3] = [a.repeat_interleave(2, -1)[..., ::2] if a.is_floating_point() else a for a in given[:3]]
        monkeypatch.setattr(module, name, watch)
        monkeypatch.setattr(_blocks, "part", part)
        bound = 2**20 if dtype == torch.float32 else 2**19
        with itm_fast.workspace(bound / 2**30):
            assert torch.equal(run(*given), whole)
    # As much as the inputs have: float32 rows in halves, contiguous rows, regions in stages.
    copied = dtype == torch.float32 or strided or op == "cross_attention_score"
    assert bool(part.call_count) == copied
    assert bound / 3 * copied < watched[0].peak <= bound


@pytest.mark.parametrize("count", [None, torch.full((16,), 30)], ids=["whole", "ragged"])
def test_regions_in_stages_take_two_copies_at_a_time(count):
    regions = torch.zeros(16, 36, 256, dtype=torch.bfloat16)  # of two groups, so that nothing is padded
    with Memory() as memory:
        cross_attention_score.region_stages(regions, count, cross_attention_score.CLUSTERED)
    assert memory.peak <= 2.1 * regions.nbytes  # with small tables


def test_a_count_out_of_range_names_its_image(gpu):
    given = [a.float() if a.is_floating_point() else a for a in examples.example("cross_attention_score", SIZE)]
    wrong = torch.tensor([36, 36, 99], dtype=torch.int32)
    with itm_fast.workspace(2**-14), pytest.raises(ValueError, match="got 99 for image 2"):
        itm_fast.cross_attention_score(*given, region_lengths=wrong, backend="cuda")
