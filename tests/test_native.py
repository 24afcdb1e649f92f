"""The native library: it is built once, where it must be, and called with tensors."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_cases import at_level, over_lesser_processors
from native_cases import cache, csrc, finished, fresh, scale, works

import itm_fast
from itm_fast import _native
from itm_fast._native import amx

__all__ = ["cache", "csrc"]  # fixtures


def test_it_is_built_once_and_says_so_once(csrc, cache, capfd):
    assert works()
    assert capfd.readouterr().err.count("compiling its CPU kernels") == 1
    home = finished(cache)
    assert {p.name for p in home.iterdir()} == {"build.json", "itm_fast.so"}
    before = (home / "itm_fast.so").stat().st_mtime_ns
    fresh()
    assert works()
    assert capfd.readouterr().err == ""
    assert (home / "itm_fast.so").stat().st_mtime_ns == before
    assert _native.outcome().path == home / "itm_fast.so"


@pytest.mark.slow
@pytest.mark.parametrize("file", ["scale.cpp", "twice.h"])
def test_changed_sources_are_built_anew(csrc, cache, file):
    assert works()
    path = csrc / "cpu" / file
    path.write_text(path.read_text() + "\n// changed\n")
    fresh()
    assert works()
    assert len(list(cache.glob("generic-*"))) == 2


def test_arguments_reach_cpp_and_errors_come_back(csrc):
    source, result = torch.ones(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    scale(source, result, 1, 0.5, torch.full((1,), 0.25, dtype=torch.float64))
    assert result[0] == 1.25
    assert result[1:].isnan().all()
    with pytest.raises(RuntimeError, match=r"^n is negative$"):
        scale(source, result, -1, 1.0)
    with pytest.raises(MemoryError, match=r"^out of memory: too many$"):
        scale(source, result, 1 << 40, 1.0)


def test_threads_that_ask_at_once_share_one_build(csrc, monkeypatch):
    built, real = [], _native.build
    monkeypatch.setattr(_native, "build", lambda *a: built.append(a) or time.sleep(0.1) or real(*a))
    threads = [threading.Thread(target=_native.why_not) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize(
    "capability,bf16,tiles,expected",
    [
        ("AVX512", True, True, "amx_bf16"),
        ("AVX512", True, False, "avx512_bf16"),
        ("AVX512", False, True, "avx512"),
        ("AVX2", True, True, "avx2"),
        ("DEFAULT", True, False, "generic"),
        ("SVE256", False, False, "generic"),
    ],
)
def test_the_level_is_what_torch_sees_and_linux_grants(monkeypatch, capability, bf16, tiles, expected):
    monkeypatch.setattr(amx, "granted", lambda: tiles)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.delenv("ITM_FAST_AMX", raising=False)
    assert _native.level() == expected
    monkeypatch.setenv("ITM_FAST_AMX", "0")
    assert _native.level() == ("avx512_bf16" if expected == "amx_bf16" else expected)


@pytest.mark.parametrize(
    "flags,answer,granted",
    [("fpu amx_bf16 amx_tile amx_int8", 0, True), ("amx_bf16 amx_tile", -1, False), ("amx_tile avx512_bf16", 0, False)],
)
def test_linux_is_asked_for_tiles_where_the_processor_has_them(monkeypatch, tmp_path, flags, answer, granted):
    asked = []

    class Linux:
        def __init__(self, name):
            self.syscall = lambda *numbers: asked.append(tuple(n.value for n in numbers)) or answer

    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags : {flags}\n\nprocessor : 1\n")
    monkeypatch.setattr(amx, "_PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(amx, "CDLL", Linux)
    assert amx.granted.__wrapped__() is granted
    assert asked == ([(158, 0x1023, 18)] if "amx_bf16" in flags else [])  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)


@pytest.mark.parametrize("fault", [None, "their products are wrong"])
def test_tiles_that_compute_something_else_are_left_out(csrc, monkeypatch, fault):
    monkeypatch.setattr(_native, "level", lambda: "amx_bf16")
    monkeypatch.setattr(amx, "fault", lambda library: fault)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the library is compiled for AVX-512")
    if _native.build(csrc, "amx_bf16").level != "amx_bf16":
        pytest.skip("the compiler does not know AMX")
    if fault is None:
        assert _native.outcome().level == "amx_bf16"
    else:
        with pytest.warns(UserWarning, match="AMX: their products are wrong; its level is avx512_bf16 now"):
            assert _native.outcome().level == "avx512_bf16"
    assert works()


@pytest.mark.slow
def test_nothing_is_built_by_importing(tmp_path):
    code = "import itm_fast, itm_fast.models; from itm_fast import _native; print(_native._outcome, _native.level())"
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1])}
    environment["ATEN_CPU_CAPABILITY"] = "default"
    environment["ITM_FAST_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("None generic", "")
    assert not (tmp_path / "cache").exists()


def test_the_kernels_are_plain_cpp():
    files = [*_native.csrc_dir().rglob("*.h"), *_native.csrc_dir().rglob("*.cpp")]
    assert files
    assert not [f.name for f in files if re.search(r"#\s*include\s*[<\"](torch|ATen|c10|pybind|Python)", f.read_text())]


@over_lesser_processors
def test_the_kernels_compile_for_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    assert _native.outcome().level == level or os.uname().machine not in ("x86_64", "AMD64")
