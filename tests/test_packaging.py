"""What the wheel and the sdist contain, and that the package works from each of them and from a bare checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout"),
    pytest.mark.slow,
]
SOURCES = ("itm_fast", "kernels", "csrc")


def tracked():
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return set(listed.stdout.splitlines())


def installed_name(path):
    """Where a file of the tree lies once installed."""
    return path if path.startswith("itm_fast/") else f"itm_fast/{path}"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    pytest.importorskip("build")
    # With isolation the build fetches setuptools anew; what is installed here serves when it is there.
    isolation = [] if _has_setuptools() is False else ["--no-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_the_wheel_is_small(built):
    assert built[0].stat().st_size < 20_000_000


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
