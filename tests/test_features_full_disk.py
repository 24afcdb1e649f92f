"""`itm-fast features` on a full disk: the error says so, no file looks complete, and the command goes on."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from itm_fast.cli import main
from itm_fast.features import writing

IMAGES, SHAPE = 40, (9, 64)  # of 2,304 bytes each; the captions take less than 8,000 bytes
COMMAND = ["features", "arrays", "out", "--split", "test", "--captions", "captions.csv", "--from-arrays"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    rng, rows = np.random.default_rng(0), ["image,caption"]
    for image in range(IMAGES):
        np.save(tmp_path / "arrays" / f"{image:02}.npy", rng.random(SHAPE, np.float32))
        rows += [f"{image:02}.npy,a red thing with the number {image}"] * 5
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


@contextmanager
def room_for(size):
    """No file may be longer, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [40_000, 92_000])
def test_features_that_do_not_fit_go_on_later(folder, capsys, size):
    with room_for(size):
        assert main([*COMMAND, "--batch-size", "4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out/.test.unfinished/ims.npy: File too large; " in said
    assert " of 40 images are kept in out/.test.unfinished: free some space and do the same again to go on" in said
    assert [path.name for path in (folder / "out").iterdir() if path.name != ".test.lock"] == [".test.unfinished"]
    goes_on()


def test_captions_that_do_not_fit_go_on_later(folder, capsys, monkeypatch):
    atomic_write = writing.atomic_write

    @contextmanager
    def full(path, mode="w"):
        with room_for(100 if path.name == "test_caps.txt" else 10**6), atomic_write(path, mode) as file:
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(writing, "atomic_write", full)
        assert main(COMMAND) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out/test_caps.txt: File too large (not written; nothing was changed)" in said
    assert "all features are kept in out/.test.unfinished: do the same again to go on" in said
    assert not list((folder / "out").glob("test_*"))
    goes_on()


def goes_on():
    """The same command, with room, ends with the whole split."""
    assert main(COMMAND) == 0
    whole = np.stack([np.load(f"arrays/{image:02}.npy") for image in range(IMAGES)])
    assert (np.load("out/test_ims.npy") == whole).all()
    assert len(Path("out/test_caps.txt").read_text().splitlines()) == 5 * IMAGES
