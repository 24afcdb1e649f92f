"""What the wheel and the sdist contain, and that the package works from each of them and from a bare checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_cases import KNOWS_ITS_FLAGS, compiled, compiler

from itm_fast import _native
from itm_fast._native import cache, compiling

__all__ = ["compiled", "compiler"]  # fixtures

_wheel = pytest.importorskip("itm_fast._native._wheel", reason="needs setuptools")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout"),
    pytest.mark.slow,
]
SOURCES = ("itm_fast", "kernels", "csrc")
OLDEST = os.environ.get("ITM_FAST_OLDEST_PYTHON")  # see tests/test_oldest_torch.py


def tracked():
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return set(listed.stdout.splitlines())


def installed_name(path):
    """Where a file of the tree lies once installed."""
    return path if path.startswith("itm_fast/") else f"itm_fast/{path}"


def build(out, levels="none"):
    """Build the sdist, and the wheel from it: in a folder of its own, without what an older build left in the tree."""
    pytest.importorskip("build")
    # With isolation the build fetches setuptools anew; what is installed here serves when it is there.
    isolation = [] if _has_setuptools() is False else ["--no-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ITM_FAST_LEVELS": levels},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    build(out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def _has_setuptools():
    code = "import setuptools, wheel; assert int(setuptools.__version__.split('.')[0]) >= 77"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_wheel_holds_the_tree_and_nothing_else(built):
    names = {n for n in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in n}
    assert names == {installed_name(p) for p in tracked()}


def test_the_sdist_holds_the_tree(built):
    with tarfile.open(built[1]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert tracked() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_is_small_and_for_every_platform(built):
    assert built[0].name.endswith("-py3-none-any.whl")
    files = zipfile.ZipFile(built[0]).infolist()
    assert sum(file.compress_size for file in files if "/openclipart/" in file.filename) < 10_000_000
    assert sum(file.compress_size for file in files) < 11_000_000


SCORE = """
import hashlib, sys
import torch
import itm_fast
from itm_fast import _native
from itm_fast.testing import inputs
torch.set_num_threads(1)
given = inputs(5, (3, 12, 7), 36, 64)
score = itm_fast.cross_attention_score(*given, backend="cpu")
print(_native.outcome().level, _native.outcome().path, hashlib.sha256(score.numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_a_wheel_with_the_library_needs_no_compiler_and_gives_the_same_bits(tmp_path):
    """The library of this machine's level is the one that the other tests have compiled."""
    level = _native.outcome().level
    build(tmp_path / "dist", levels=level)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(r"itm_fast-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    extra = set(names) - {installed_name(path) for path in tracked()}
    (folder,) = {Path(name).parent.as_posix() for name in extra}
    assert folder.startswith(f"itm_fast/_native/libraries/{level}-")
    assert {Path(name).name for name in extra} == {"itm_fast.so", "build.json"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    found = []
    without = (tmp_path / "installed", {"PATH": str(tmp_path / "nothing")})
    runs = [(sys.executable, *without), (sys.executable, ROOT, {})] + ([(OLDEST, *without)] if OLDEST else [])
    for python, path, environment in runs:
        kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "ITM_FAST_CACHE_DIR")}
        here = {"PYTHONPATH": str(path), "ITM_FAST_BACKEND": "cpu", **environment}
        if environment:
            here["ITM_FAST_CACHE_DIR"] = str(tmp_path / "cache")
        elif "ITM_FAST_CACHE_DIR" in os.environ:
            here["ITM_FAST_CACHE_DIR"] = os.environ["ITM_FAST_CACHE_DIR"]
        done = subprocess.run(
            [python, "-c", SCORE], capture_output=True, text=True, check=False, cwd=tmp_path, env=kept | here
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    shipped = str(tmp_path / "installed" / folder / "itm_fast.so")
    assert {where for _, where, _ in found[::2]} == {shipped}
    assert found[1][1] != shipped
    assert len({(level, bits) for level, _, bits in found}) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_a_level_that_was_never_compiled_is_compiled_for_the_wheel(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "seven.cpp").write_text(f'extern "C" int seven() {{ return 7; }} // {tmp_path}')
    monkeypatch.setattr(_wheel, "_csrc", lambda: tmp_path / "csrc")
    monkeypatch.chdir(tmp_path)
    # As if ninja ended before anybody had looked how far it is.
    run = compiling._run
    monkeypatch.setattr(compiling, "_run", lambda command, folder, deadline, *_: run(command, folder, deadline))
    _wheel.build_libraries(["generic", "avx2"], Path("libraries"), compiling.find_compiler())
    folders = sorted(path.name for path in (tmp_path / "libraries").iterdir())
    assert [name.partition("-")[0] for name in folders] == ["avx2", "generic"]
    loaded = cache.load(tmp_path / "libraries" / folders[1])
    assert (loaded.level, loaded.library.seven()) == ("generic", 7)
    said = capfd.readouterr().err
    assert "compiling CPU kernels for generic, avx2" in said
    assert "2 of 2 files are compiled after" in said
    # Another wheel of the same sources takes the libraries from the cache folder.
    _wheel.build_libraries(["avx2", "generic"], Path("again"), compiling.find_compiler())
    assert "compiling" not in capfd.readouterr().err
    for folder in folders:
        again, first = (tmp_path / place / folder for place in ("again", "libraries"))
        assert sorted(path.name for path in again.iterdir()) == ["build.json", "itm_fast.so"]
        assert (again / "itm_fast.so").read_bytes() == (first / "itm_fast.so").read_bytes()


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_levels_share_what_has_no_bfloat16_kernels(tmp_path, monkeypatch, compiled):
    """Only what asks for bfloat16's instructions, here one of two sources, is compiled for their levels too."""
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_wheel, "_csrc", lambda: tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "seven.cpp").write_text('extern "C" int seven() { return 7; }')
    own = '#if defined(__AVX512BF16__)\nextern "C" int eight() { return 8; }\n#endif'
    (tmp_path / "csrc" / "cpu" / "eight.cpp").write_text(own)
    _wheel.build_libraries(["avx512_bf16", "avx512", "generic"], tmp_path / "libraries", compiling.find_compiler())
    assert compiled() == ["eight.cpp"] * 3 + ["library"] * 3 + ["seven.cpp"] * 2
    loaded = {found.level: found.library for found in map(cache.load, (tmp_path / "libraries").iterdir())}
    assert loaded["avx512_bf16"].eight() + loaded["avx512_bf16"].seven() == 15
    assert not hasattr(loaded["avx512"], "eight")


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_sources_that_levels_share_have_no_bfloat16_instruction():
    level = _native.outcome().level
    if level not in _native.BFLOAT16_LEVELS:
        pytest.skip("this processor has none")
    objects = cache.cache_dir() / f"objects-{level}-{compiling.compiler_name(compiling.find_compiler())}"
    folders = objects / "cpu", ROOT / "csrc/cpu"
    theirs, ours = ({path.name: path.read_bytes() for path in folder.glob("*.*")} for folder in folders)
    if theirs != ours:
        pytest.skip("the library compiled last with this cache folder is of other sources")
    sources = {path: bool(compiling._BFLOAT16.search(path.read_bytes())) for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    for source, own in sources.items():
        if not own or source.stem == "similarity_graph":
            command = ["objdump", "-d", "--no-show-raw-insn", str(objects / f"{source.stem}.o")]
            listing = subprocess.run(command, capture_output=True, check=True).stdout
            assert own == bool(re.search(rb"\t[a-z0-9]*bf16", listing)), source


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_of_all_levels_a_wheel_has_those_that_the_compiler_knows(tmp_path, monkeypatch, compiler, capfd):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "seven.cpp").write_text(f"int seven() {{ return 7; }} // {tmp_path}")
    monkeypatch.setattr(_wheel, "_csrc", lambda: tmp_path / "csrc")
    compiler('case "$*" in *-mavx*|*-mamx*) echo "error: what is this?"; exit 1;; *) exec REAL "$@";; esac')
    _wheel.build_libraries(list(_native.LEVELS), tmp_path / "libraries", compiling.find_compiler())
    (folder,) = (tmp_path / "libraries").iterdir()
    assert folder.name.startswith("generic-")
    assert "9.9.9 does not know amx_bf16: it is left out" in capfd.readouterr().err
    with pytest.raises(_native.Unavailable, match="does not know amx_bf16; leave it out of ITM_FAST_LEVELS"):
        _wheel.build_libraries(["amx_bf16"], tmp_path / "others", compiling.find_compiler())


def test_levels_are_asked_for_by_name():
    assert _wheel.levels_asked("all") == _wheel.levels_asked("") == list(_native.LEVELS)
    assert _wheel.levels_asked("none") == []
    assert _wheel.levels_asked("Generic AVX2") == ["generic", "avx2"]
    for text in ("avx2,avx1024", "none,avx2"):
        with pytest.raises(ValueError, match=rf"must be all or none alone, or some of amx_bf16, .*, got '{text}'"):
            _wheel.levels_asked(text)


BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Builds a wheel of the tree with one small source in csrc/cpu, as pip does; returns its name and what was said."""
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("ITM_FAST_LEVELS", "CXX", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    tree, data = tmp_path / "tree", shutil.ignore_patterns("*.npy", "*.tar", "*.zip", "*.png", "*.jpg", "cpu", "*.pyc")
    for folder in ("itm_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=data)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    (tree / "csrc" / "cpu").mkdir()
    (tree / "csrc" / "cpu" / "seven.cpp").write_text('extern "C" int seven() { return 7; }')

    def wheel(kind="build_wheel", **environment):
        command = [sys.executable, "-c", BUILD, kind, str(tmp_path)]
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines()[-1] if not done.returncode else None, done.stderr

    return wheel


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_a_wheel_has_the_libraries_wherever_there_is_a_compiler(small, tmp_path, compiler):
    name, said = small()
    assert re.fullmatch(r"itm_fast-[\d.]+-py3-none-(?!any)\w+\.whl", name), said
    found = {Path(path).parts[3].partition("-")[0] for path in zipfile.ZipFile(tmp_path / name).namelist()
             if path.startswith("itm_fast/_native/libraries/")}  # fmt: skip
    left_out = set(re.findall(r"does not know (\w+): it is left out", said))
    assert found | left_out == set(_native.LEVELS)
    assert "generic" in found
    # An editable installation compiles nothing: each change of the sources would ask for all levels again.
    assert small("build_editable", CXX=str(compiler("exit 1")))[0]


def test_without_a_compiler_the_wheel_compiles_at_first_use(small, tmp_path):
    name, said = small(PATH=str(tmp_path))
    assert name.endswith("-py3-none-any.whl")
    assert "WARNING: this wheel holds no CPU kernels" in said
    assert "no C++ compiler on PATH; install g++ or clang++" in said
    name, said = small(PATH=str(tmp_path), ITM_FAST_LEVELS="all")
    assert not name
    assert "no C++ compiler on PATH" in said


def test_a_compiler_that_fails_makes_no_wheel(small, compiler):
    """Old compilers, which know no C++20, count as none, but not one that CXX names, nor one that fails later."""
    broken = KNOWS_ITS_FLAGS + '\necho "seven.cpp:1: error: what is this?"; exit 1'
    name, said = small(CXX=str(compiler(broken)))
    assert not name
    assert "the CPU kernels do not compile with g++ (of the tests) 9.9.9: seven.cpp:1: error: what is this?" in said
    assert said.endswith("; ITM_FAST_LEVELS=none installs without compiling\n")
    assert "Traceback" not in said
    assert "ITM_FAST_LEVELS must be" in small(ITM_FAST_LEVELS="sse")[1].splitlines()[-1]
    name, said = small(CXX=str(compiler("echo error: -std=c++20; exit 1")))
    assert not name
    assert "cannot compile C++20 (error: -std=c++20); install GCC 11 or newer, or set CXX" in said


@pytest.mark.skipif(_native.why_not() is not None, reason="needs a compiler")
def test_the_generic_level_has_nothing_of_x86():
    """So it compiles for any processor: no header, no intrinsic and no assembly of x86 remains after preprocessing."""
    compiler = compiling.find_compiler().command
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    unit = "".join(f'#include "{source}"\n' for source in sources)
    command = [*compiler, *compiling.FLAGS, "-I", str(ROOT / "csrc"), "-E", "-x", "c++", "-"]
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=True)
    headers = set(re.findall(r'^# \d+ "([^"]+)"', done.stdout, re.MULTILINE))
    assert {str(source) for source in sources} <= headers
    assert not [header for header in headers if header.endswith(("intrin.h", "cpuid.h"))]
    ours = re.split(r'^# \d+ "', done.stdout, flags=re.MULTILINE)
    ours = "".join(part for part in ours if part.startswith(str(ROOT)))
    assert not re.findall(r"\b_mm\d*_\w+|__builtin_ia32\w+|\basm\b|__asm\w*", ours)


@pytest.mark.parametrize("form", ["wheel", "checkout"])
def test_it_imports_and_scores_from(form, built, tmp_path):
    path = tmp_path if form == "wheel" else ROOT
    if form == "wheel":
        zipfile.ZipFile(built[0]).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r})\n"
        "import itm_fast, itm_fast.kernels, torch\n"
        "from itm_fast import _native\n"
        "from itm_fast.testing import inputs\n"
        "print(_native.csrc_dir(), _native.why_not())\n"
        "print(itm_fast.__file__, tuple(itm_fast.cross_attention_score(*inputs(2, (3, 2), 4, 8)).shape))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "(2, 2)" in done.stdout
    assert f"{path / 'itm_fast' / 'csrc' if form == 'wheel' else path / 'csrc'} None\n" in done.stdout
