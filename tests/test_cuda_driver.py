"""CUDA kernels are compiled, kept, loaded and launched, and everything that may be wrong is said in a sentence: no GPU
is needed, as a library that stands in for NVIDIA's driver takes the launches."""

import ctypes
import dataclasses
import os
import threading
import types
import warnings
from pathlib import Path

import cuda_stub
import pytest
import torch
from cuda_cases import KERNEL, Affine, own_sources

from itm_fast import _cuda, _native
from itm_fast._cuda import Kernel, cubins, driver, launch, nvrtc
from itm_fast.cli import doctor

CPU = torch.device("cpu", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A process that sees GPUs, launches of which `launches` has, and a cache folder of its own."""
    if reason := nvrtc.why_not():
        pytest.skip(reason)
    sources, launches = own_sources(monkeypatch, tmp_path), []

    def run(name, problem, x, y, threads, shared, order):
        p = Affine.from_address(problem)
        launches.append((name, x, y, threads, shared, order))
        source, result = ((ctypes.c_float * p.n).from_address(at) for at in (p.x, p.y))
        for i in range(min(p.n, x * threads)):
            result[i] = p.a * source[i] + 3

    with cuda_stub.installed(run, order=5, compiles=True) as seen:
        yield types.SimpleNamespace(
            launches=launches, seen=seen, sources=sources, cache=tmp_path / "cache", compiled=compiled(monkeypatch)
        )


def compiled(monkeypatch):
    """The architectures that NVRTC compiles for from now on."""
    seen, real = [], nvrtc.compile

    def compile(*args):
        seen.append(args[4])
        return real(*args)

    monkeypatch.setattr(nvrtc, "compile", compile)
    return seen


def affine(kernel=KERNEL, n=40, grid=None, device=CPU):
    """a x + 3 by the kernel, or the error."""
    x, y = torch.arange(n, dtype=torch.float32), torch.full((n,), torch.nan)
    launch(kernel, Affine(x.data_ptr(), y.data_ptr(), n, 0.5), grid or (-(-n // 32), 1), device)
    return y


def fresh():
    """What a new process knows."""
    _cuda._functions.clear()


def test_a_launch_compiles_loads_and_runs_once_each(gpu, monkeypatch):
    assert torch.equal(affine(), torch.arange(40) * 0.5 + 3)
    monkeypatch.setattr(cubins, "build", lambda *_: pytest.fail("looked for again"))
    assert torch.equal(affine(), torch.arange(40) * 0.5 + 3)
    assert gpu.launches == [("_Z6affineILi3EEv6Affine", 2, 1, 32, 128, 5)] * 2
    assert gpu.compiled == [90]


def test_a_grid_without_blocks_launches_nothing(gpu):
    for grid in ((0, 1), (1, 0)):
        assert affine(n=2, grid=grid).isnan().all()
    assert not gpu.launches


def test_another_process_finds_the_compiled_kernel(gpu):
    affine()
    (entry,) = gpu.cache.glob("cubin-sm_90-*")
    os.utime(entry, (1e9, 1e9))
    (kept,) = cubins.kept()
    assert entry.stat().st_mtime == 1e9  # as one that is only listed is not used
    fresh()
    assert affine()[2] == 4
    assert entry.stat().st_mtime > 1e9
    assert gpu.compiled == [90]
    assert kept == {
        "kernel": "affine<3>", "architecture": 90, "nvrtc": nvrtc.library().version, "shared": 0, "spilled": 0,
        "entry": "_Z6affineILi3EEv6Affine", "registers": kept["registers"],
        "serialized": False, "current": True, "sha256": _native.cache.checksum([entry / "kernel.cubin"]),
    }  # fmt: skip
    assert kept["registers"] > 4


def test_doctor_shows_the_compiler_the_driver_and_the_kernels_of_these_sources(gpu):
    affine()
    library, registers = nvrtc.library(), cubins.kept()[0]["registers"]
    shown = {"NVRTC": f"{library.version} ({library.path})", "driver": "runs CUDA 13.0"}
    kernel = {"affine<3> for sm_90": f"{registers} registers, none spilled, compiled by NVRTC {library.version}"}
    more = {"not used": "1 more in the cache folder, compiled from other sources or by another NVRTC"}
    for file, found in (("other.cu", shown | kernel), ("affine.cuh", shown | more)):
        with (gpu.sources / file).open("a") as source:
            source.write("// more\n")
        cubins._sources.cache_clear()
        assert doctor._cuda_rows(doctor._cuda_kernels()) == found
    fresh()
    affine()
    assert doctor._cuda_rows(doctor._cuda_kernels()) == shown | kernel | more


def _shorter(entry):
    (entry / "kernel.cubin").write_bytes((entry / "kernel.cubin").read_bytes()[:-9])


def _no_note(entry):
    (entry / "build.json").unlink()


def _lesser_note(entry):
    (entry / "build.json").write_text((entry / "build.json").read_text().replace("registers", "resisters"))


def _writable(entry):
    (entry / "kernel.cubin").chmod(0o666)


@pytest.mark.parametrize("damage", [_shorter, _no_note, _lesser_note, _writable])
def test_a_damaged_kernel_is_noticed_and_compiled_again(gpu, damage):
    affine()
    (entry,) = gpu.cache.glob("cubin-sm_90-*")
    damage(entry)
    fresh()
    assert affine()[2] == 4
    assert gpu.compiled == [90, 90]
    fresh()
    affine()
    assert gpu.compiled == [90, 90]
    assert list(gpu.cache.iterdir()) == [entry]


def test_whatever_the_code_depends_on_names_its_entry(gpu, monkeypatch):
    affine()
    release = nvrtc.release()
    assert f"V{nvrtc.library().version}." in release  # with the number of the patch
    changes = [
        lambda: setattr(gpu.seen, "capability", (8, 6)),
        lambda: (gpu.sources / "affine.cuh").write_text((gpu.sources / "affine.cuh").read_text() + "// more\n"),
        lambda: (gpu.sources / "affine.cu").write_text((gpu.sources / "affine.cu").read_text() + "// more\n"),
        lambda: monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math")),
        lambda: monkeypatch.setattr(nvrtc, "release", lambda: f"a patch of {release}"),
    ]
    for k, change in enumerate(changes):
        change()
        fresh()
        cubins._sources.cache_clear()
        affine()
        assert len(list(gpu.cache.glob("cubin-*"))) == k + 2
    affine(Kernel("affine.cu", "affine<4>", Affine, 32, 128))
    assert len(list(gpu.cache.glob("cubin-*"))) == len(changes) + 2
    gpu.seen.capability = (9, 0)
    affine(dataclasses.replace(KERNEL, specific=True))
    assert len(list(gpu.cache.glob("cubin-*"))) == len(changes) + 3
    assert gpu.compiled == [90, *[86] * 6, 90]


def test_a_kernel_that_cannot_be_kept_runs_with_a_warning(gpu, monkeypatch):
    gpu.cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="compiles its CUDA kernels anew in every process.*set ITM_FAST_CACHE_DIR"):
        assert affine()[2] == 4


def test_a_full_disk_keeps_no_kernel_and_runs_it(gpu, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="anew in every process: no space left for compiling the CUDA kernels in"):
        assert affine()[2] == 4


def test_threads_that_want_one_kernel_compile_it_once(gpu, monkeypatch):
    second, real, loads, load = threading.Event(), nvrtc.compile, [], driver.load
    monkeypatch.setattr(driver, "load", lambda *args: loads.append(args[-1]) or load(*args))

    def slow(*args):
        if gpu.compiled:
            second.set()
        found = real(*args)
        second.wait(0.2)  # while the other thread may begin to compile too
        return found

    monkeypatch.setattr(nvrtc, "compile", slow)
    results = []
    threads = [threading.Thread(target=lambda: results.append(affine())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r[2] for r in results] == [4, 4]
    assert (gpu.compiled, loads) == ([90], [CPU])


def test_each_device_loads_the_kernel_into_its_own_context(gpu, monkeypatch):
    loads, real = [], driver.load
    monkeypatch.setattr(driver, "load", lambda *args: loads.append(args[-1]) or real(*args))
    devices = [CPU, torch.device("cpu", 1)]
    for device in devices * 2:
        assert affine(device=device)[2] == 4
    assert loads == devices
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet failed: invalid argument \(CUDA_ERROR_INVALID_VALUE\)$"):
        affine(device=torch.device("cpu", 2))


def test_nothing_is_loaded_while_a_graph_is_captured(gpu):
    gpu.seen.capturing = True
    with pytest.raises(RuntimeError, match=r"affine<3> is not loaded on cpu:0 yet.*captured; call the op once before"):
        affine()
    gpu.seen.capturing = False
    affine()
    gpu.seen.capturing = True
    assert affine()[2] == 4


def test_a_graph_is_captured_on_the_kernels_device_not_on_the_callers(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: torch.cuda.current_device() == 1)
    assert affine()[2] == 4
    with pytest.raises(RuntimeError, match="affine<3> is not loaded on cpu:1 yet"):
        affine(device=torch.device("cpu", 1))


def test_the_drivers_errors_are_sentences(gpu):
    cuda_stub.fail("cuModuleLoadData", 200)
    said = r"^cuModuleLoadData failed: device kernel image is invalid \(CUDA_ERROR_INVALID_IMAGE\)$"
    with pytest.raises(RuntimeError, match=said):
        affine()
    cuda_stub.fail("cuModuleLoadData", 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"^cuModuleLoadData failed: out of memory \(CUDA_ERROR_OUT"):
        affine()
    cuda_stub.fail("cuModuleLoadData", 999)
    with pytest.raises(RuntimeError, match=r"^cuModuleLoadData failed: error 999, which this driver does not know$"):
        affine()
    affine()
    cuda_stub.fail("cuLaunchKernel", 719)
    said = r"^launching affine<3> with 2 x 1 blocks failed: unspecified launch failure \(CUDA_ERROR_LAUNCH_FAILED\)$"
    with pytest.raises(RuntimeError, match=said):
        affine()
    with pytest.raises(RuntimeError, match=r"with 2 x 70000 blocks failed: invalid argument"):
        affine(grid=(2, 70000))
    with pytest.raises(RuntimeError, match="cuFuncSetAttribute failed: invalid argument"):
        affine(Kernel("affine.cu", "affine<3>", Affine, 32, 228 << 10))


def test_a_source_that_does_not_compile_is_named_with_its_first_error(gpu):
    (gpu.sources / "affine.cu").write_text("struct Affine { float x };\nint y = z;\n")
    with pytest.raises(RuntimeError, match=r"compile affine<3> of affine\.cu for sm_90: affine\.cu\(1\): error:"):
        affine()
    assert not list(gpu.cache.glob("cubin-*"))


def test_what_a_kernel_raises_is_printed_and_fails_the_launch(capsys):
    def run(*_):
        raise ValueError("a race")

    with cuda_stub.installed(run), pytest.raises(RuntimeError, match=r"affine<3> .* \(CUDA_ERROR_LAUNCH_FAILED\)"):
        affine()
    assert "ValueError: a race" in capsys.readouterr().err


FIELDS = Affine._fields_


@pytest.mark.parametrize(
    "fields, said",
    [
        (FIELDS[:3], r"Affine in Python\(1\): error: there are more elements"),
        ((FIELDS[1], FIELDS[0], *FIELDS[2:]), "Affine::y has another place in Python"),
        ((*FIELDS[:2], ("n", ctypes.c_short), FIELDS[3]), "Affine::n has another size in Python"),
        ((*FIELDS[:2], ("n", ctypes.c_float), FIELDS[3]), "Affine::n is a float in Python"),
        ((*FIELDS[:3], ("a", ctypes.c_int)), "Affine::a is an integer in Python"),
    ],
)
def test_a_struct_that_is_another_in_python_does_not_compile(gpu, fields, said):
    other = type("Affine", (ctypes.Structure,), {"_fields_": fields})
    with pytest.raises(RuntimeError, match=said):
        cubins.build(Kernel("affine.cu", "affine<3>", other, 32, 128), 80)


def test_a_struct_in_a_struct_is_compared_too(gpu):
    source = (gpu.sources / "affine.cu").read_text() + "struct Outer { int first; Affine inner; };\n"
    (gpu.sources / "affine.cu").write_text(source)
    for fields in (FIELDS, (FIELDS[1], FIELDS[0], *FIELDS[2:])):
        inner = type("Affine", (ctypes.Structure,), {"_fields_": fields})
        outer = type("Outer", (ctypes.Structure,), {"_fields_": (("first", ctypes.c_int), ("inner", inner))})
        kernel = Kernel("affine.cu", "affine<3>", outer, 32, 128)
        if fields is FIELDS:
            assert cubins.build(kernel, 80).registers
    with pytest.raises(RuntimeError, match="Affine::y has another place in Python"):
        cubins.build(kernel, 80)


@pytest.fixture
def without_nvrtc():
    nvrtc._found.cache_clear()
    yield
    nvrtc._found.cache_clear()


@pytest.mark.parametrize("cuda, package", [(None, "nvidia-cuda-nvrtc"), ("12.8", "nvidia-cuda-nvrtc-cu12")])
def test_without_nvrtc_its_package_is_named(without_nvrtc, monkeypatch, cuda, package):
    monkeypatch.setattr(nvrtc, "_places", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    said = f"which compiles its kernels, is not there; `pip install {package}` brings it"
    assert nvrtc.why_not() == f"NVRTC{' 12' if cuda else ''}, {said}"
    with pytest.raises(_native.Unavailable, match="is not there"):
        nvrtc.library()


def test_nvrtc_of_another_major_version_than_torchs_is_not_taken(without_nvrtc, monkeypatch):
    if nvrtc.why_not():
        pytest.skip(nvrtc.why_not())
    major = int(nvrtc.library().version.partition(".")[0])
    for other, there in ((major, True), (major - 1, False)):
        nvrtc._found.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", f"{other}.1")
        assert (nvrtc.why_not() is None) == there
    nvrtc._found.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
    assert Path(nvrtc.library().path).is_file()


def test_a_library_that_is_not_nvrtc_is_passed_over(without_nvrtc, monkeypatch):
    places = list(nvrtc._places())
    monkeypatch.setattr(nvrtc, "_places", lambda: iter([ctypes.util.find_library("c") or "libc.so.6", *places]))
    assert nvrtc.why_not() is None


@pytest.fixture
def stub():
    with cuda_stub.installed(lambda *_: None) as seen:
        yield seen


def why_not(dtype=torch.float32, device=CPU):
    return _cuda.why_not(device, dtype)


def test_what_the_kernels_need_is_said_in_a_sentence(stub, monkeypatch):
    assert why_not() is None
    assert why_not(device=torch.device("meta")) == "needs CUDA tensors, got meta"
    assert why_not(torch.float64).endswith("take no float64; torch and reference do")
    stub.capability = (7, 5)
    assert why_not() is None
    assert why_not(torch.bfloat16) == (
        "a GPU of compute capability 7.5 cannot multiply bfloat16 values; float16 and float32 run on it"
    )
    stub.capability = (7, 0)
    assert why_not() == "needs a GPU of compute capability 7.5 or more, and NVIDIA Stub has 7.0"
    stub.capability = (13, 0)
    assert why_not() == (
        "NVRTC 13.5 cannot compile for compute capability 13.0; install a newer CUDA build of torch"
    )
    monkeypatch.setattr(nvrtc, "_found", lambda: "no NVRTC")
    assert why_not() == "no NVRTC"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in why_not()


def test_without_a_driver(stub, monkeypatch, tmp_path):
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "SONAME", "libnothing.so.1")
    assert doctor._cuda_kernels()["driver"] == why_not()
    assert why_not().startswith("NVIDIA's driver does not load: libnothing.so.1: cannot open")
    with pytest.raises(_native.Unavailable, match="does not load"):
        driver.version()


def test_a_driver_that_does_not_start(stub):
    cuda_stub.fail("cuInit", 100)
    assert why_not() == (
        "NVIDIA's driver does not start: no CUDA-capable device is detected (CUDA_ERROR_NO_DEVICE)"
    )


def test_the_drivers_version(stub):
    assert driver.version() == "13.0"


def test_a_thread_that_has_not_used_the_device_launches(gpu):
    affine()
    thread = threading.Thread(target=affine)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnhandledThreadExceptionWarning)
        thread.start()
        thread.join()
    assert len(gpu.launches) == 2
