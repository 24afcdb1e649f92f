"""Original checkpoints: every form in which they exist, what is not one, and hostile files."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import pickletools
import resource
import struct
import tarfile
import zipfile

import numpy
import pytest
import torch

from itm_fast.models.checkpoint import load
from itm_fast.training import checkpoint
from itm_fast.training.checkpoint import save

OPT = argparse.Namespace(
    module_name="SGR", embed_size=8, learning_rate=2e-4, bi_gru=True, data_path="/données/f30k", resume=None
)


def _parts():
    torch.manual_seed(0)
    return [
        torch.nn.Linear(3, 4),
        torch.nn.GRU(3, 4, bidirectional=True),
        torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)),
    ]


def _content(**changes):
    content = {
        "epoch": 7,
        "model": [part.state_dict() for part in _parts()],
        "best_rsum": 495.25,
        "opt": OPT,
        "Eiters": 9064,
    }
    content.update(changes)
    return content


def _write(tmp_path, content, **options):
    path = tmp_path / "model_best.pth.tar"
    torch.save(content, path, **options)
    return path


def _same(loaded, rsum=495.25):
    assert (loaded.epoch, loaded.iterations) == (7, 9064)
    assert type(loaded.best_rsum) is float
    assert loaded.best_rsum == rsum
    assert vars(loaded.opt) == vars(OPT)
    for part, state in zip(_parts(), loaded.model, strict=True):
        part.load_state_dict(state)
        for name, value in part.state_dict().items():
            assert torch.equal(value, state[name])
            assert state[name].device.type == "cpu"


def _rewrite(data: bytes, change) -> bytes:
    """Re-emit the pickles of an old-format file; `change(name, argument, raw)` gives new bytes."""
    out, stream = [], io.BytesIO(data)
    for _ in range(5):  # magic number, protocol, system, content, storage keys; raw storages follow
        start = stream.tell()
        ops = list(pickletools.genops(stream))
        ends = [position for _, _, position in ops[1:]] + [stream.tell()]
        for (op, argument, position), end in zip(ops, ends, strict=True):
            raw = data[position:end]
            out.append(change(op.name, argument, raw) or raw)
        assert stream.tell() > start
    return b"".join(out) + stream.read()


class _Rsum:
    """Pickles as numpy's scalar does in Python 2, its raw bytes marked for `_as_python2`."""

    def __reduce__(self):
        return type(numpy.float64(1)).__reduce__(numpy.float64(1))[0], (numpy.dtype("f8"), "@@RSUM@@")


def _as_python2(data: bytes, rsum: float) -> bytes:
    def change(op, argument, raw):
        if op == "BINUNICODE":
            text = struct.pack("<d", rsum) if argument == "@@RSUM@@" else argument.encode()
            return b"U" + bytes([len(text)]) + text
        if op == "GLOBAL" and argument == "numpy._core.multiarray scalar":
            return b"cnumpy.core.multiarray\nscalar\n"
        return None

    return _rewrite(data, change)


def _as_cuda(data: bytes) -> bytes:
    def change(op, argument, raw):
        if op == "BINUNICODE" and argument == "cpu":
            return b"X\x06\x00\x00\x00cuda:0"
        if op == "GLOBAL" and argument == "torch FloatStorage":
            return b"ctorch.cuda\nFloatStorage\n"
        return None

    return _rewrite(data, change)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_reads_both_serialisations(tmp_path, zipped):
    _same(load(_write(tmp_path, _content(), _use_new_zipfile_serialization=zipped)))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize(
    "rsum",
    [numpy.float64(495.25), numpy.float32(495.25), numpy.int64(495), torch.tensor(495.25)],
    ids=["float64", "float32", "int64", "tensor"],
)
def test_best_rsum_may_be_a_numpy_scalar(tmp_path, rsum, zipped):
    loaded = load(_write(tmp_path, _content(best_rsum=rsum), _use_new_zipfile_serialization=zipped))
    _same(loaded, float(rsum))


def test_big_endian_numpy_scalar(tmp_path):
    class Scalar:
        def __reduce__(self):
            return type(numpy.float64(1)).__reduce__(numpy.float64(1))[0], (numpy.dtype(">f8"), struct.pack(">d", 2.5))

    _same(load(_write(tmp_path, _content(best_rsum=Scalar()))), 2.5)


UTF8_LIKE = struct.unpack("<d", b"\xc3\xa9\xc3\xa9\xc3\xa9\x7e\x40")[0]  # reads as four letters of UTF-8


@pytest.mark.parametrize("rsum", [495.25, 495.3, 2.0, UTF8_LIKE])
def test_python_2_text_and_numpy_numbers(tmp_path, rsum):
    buffer = io.BytesIO()
    torch.save(_content(best_rsum=_Rsum()), buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "model_best.pth.tar"
    path.write_bytes(_as_python2(buffer.getvalue(), rsum))
    _same(load(path), rsum)


def test_cuda_tensors_come_to_the_cpu(tmp_path):
    buffer = io.BytesIO()
    torch.save(_content(), buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "old.pth.tar"
    path.write_bytes(_as_cuda(buffer.getvalue()))
    assert b"cuda:0" in path.read_bytes()
    _same(load(path))

    new, moved = _write(tmp_path, _content()), tmp_path / "new.pth.tar"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(moved, "w", zipfile.ZIP_STORED) as target:
        for entry in source.namelist():
            data = source.read(entry)
            if entry.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                assert b"cuda:0" in data
            target.writestr(entry, data)
    _same(load(moved))


def test_dataparallel_prefix_is_dropped_and_versions_survive(tmp_path):
    states = [torch.nn.DataParallel(part).state_dict() for part in _parts()]
    assert all(name.startswith("module.") for state in states for name in state)
    loaded = load(_write(tmp_path, _content(model=states)))
    _same(loaded)
    assert loaded.model[2]._metadata["1"]["version"] == 2


def test_a_name_that_merely_begins_with_module_is_kept(tmp_path):
    one = torch.ones(1)
    states = [{"module.weight": one, "bias": one}, {"a": one}, {"b": one}]
    assert list(load(_write(tmp_path, _content(model=states))).model[0]) == ["module.weight", "bias"]


def _harmless():
    raise AssertionError("a checkpoint must not call this")


class _Calls:
    def __reduce__(self):
        return _harmless, ()


def test_what_the_program_allows_elsewhere_is_not_allowed_here_and_stays_allowed_there(tmp_path):
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([_harmless, argparse.Namespace])
    try:
        mine = set(torch.serialization.get_safe_globals())
        _same(load(_write(tmp_path, _content())))
        with pytest.raises(ValueError, match=r"refused, because it would run or build .*_harmless"):
            load(_write(tmp_path, _content(best_rsum=_Calls())))
        assert set(torch.serialization.get_safe_globals()) == mine
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class _Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class _Evaluate:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.path!r})",)


@pytest.mark.parametrize("hostile", [_Touch, _Evaluate])
@pytest.mark.parametrize("place", ["best_rsum", "opt", "whole"])
@pytest.mark.parametrize("form", ["zip", "before-1.6", "plain pickle"])
def test_hostile_files_never_run(tmp_path, hostile, place, form):
    trap = tmp_path / "it-ran"
    bomb = hostile(trap)
    content = bomb if place == "whole" else _content(**{"model": [], place: bomb})
    if place == "opt":
        content["opt"] = argparse.Namespace(module_name="SGR", data_path=bomb)
    path = tmp_path / "model_best.pth.tar"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"refused, because it would run or build '(posix\.mkdir|(builtins\.)?eval)'"):
        load(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(bomb))
    assert trap.exists(), "the trap itself must work"


def test_numpy_object_scalars_are_refused(tmp_path):
    class Scalar:
        def __reduce__(self):
            return type(numpy.float64(1)).__reduce__(numpy.float64(1))[0], (numpy.dtype("O"), b"x")

    with pytest.raises(ValueError, match="numpy scalar of type 'O8'"):
        load(_write(tmp_path, _content(best_rsum=Scalar())))


def _wrong_files():
    def saved(content):
        return lambda path: torch.save(content, path)

    def cut(path):
        torch.save(_content(), path)
        path.write_bytes(path.read_bytes()[:1500])

    def cut_old(path):
        torch.save(_content(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-10])

    def tarred(path):
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "model.py")

    def script(path):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))

    def content_without(key):
        return {name: value for name, value in _content().items() if name != key}

    return {
        "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
        "text": (lambda path: path.write_bytes(b"hello world"), "cannot be read as a torch file"),
        "web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "is a web page"),
        "lfs": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/"), "git lfs pull"),
        "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00\x00"), "is a gzip file"),
        "tar": (tarred, "is a tar archive"),
        "cut short": (cut, r"damaged, cut short .* finding central directory\); a"),
        "cut short before 1.6": (cut_old, "damaged, cut short"),
        "TorchScript": (script, "is a TorchScript archive"),
        "bare state dict": (saved(_parts()[0].state_dict()), r"bare state dict of 2 tensors"),
        "tensor": (saved(torch.ones(2, 3)), r"holds one tensor \[2, 3\]; a checkpoint is the model_best"),
        "list": (saved([1, 2]), "holds a list; a checkpoint is"),
        "no opt": (saved(content_without("opt")), "epoch, model, best_rsum, Eiters without opt"),
        "empty dict": (saved({}), "a dict of nothing without model, opt"),
        "opt a list": (saved(_content(opt=["SGR"])), "opt must be an argparse.Namespace or a dict, holds a list"),
        "opt of numbers": (saved(_content(opt={1: "SGR"})), "opt must be .* or a dict, holds a dict of 1"),
        "model a state dict": (
            saved(_content(model=_parts()[0].state_dict())),
            "model must be a list of state dicts, holds a bare state dict",
        ),
        "model empty": (saved(_content(model=[])), "model must be a list of state dicts, holds a list"),
        "model of numbers": (saved(_content(model=[1, 2, 3])), r"model\[0\] must be .* holds a int"),
        "SGRAF with two": (
            saved(_content(model=_content()["model"][:2])),
            "opt.module_name says SGRAF, whose model is 3 state dicts, but the file holds 2",
        ),
        "SCAN with three": (
            saved(_content(opt=argparse.Namespace(cross_attn="t2i"))),
            "opt.cross_attn says SCAN, whose model is 2 state dicts, but the file holds 3",
        ),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", _wrong_files())
def test_what_is_no_checkpoint_is_named(tmp_path, kind):
    write, sentence = _wrong_files()[kind]
    path = tmp_path / "model_best.pth.tar"
    write(path)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pth.tar")


def _save(path, **changes):
    content = _content(**changes)
    save(
        path,
        epoch=content["epoch"],
        model=content["model"],
        best_rsum=content["best_rsum"],
        opt=content["opt"],
        iterations=content["Eiters"],
    )


def test_saves_what_published_code_loads(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    _save(path, best_rsum=numpy.float64(495.25))
    _same(load(path))
    assert not zipfile.is_zipfile(path), "torch before 1.6 reads no zip files"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)  # none of the allow-list of `load`
    assert list(content) == ["epoch", "model", "best_rsum", "opt", "Eiters"]
    assert type(content["best_rsum"]) is float
    assert type(content["opt"]) is argparse.Namespace
    assert [type(state) for state in content["model"]] == [collections.OrderedDict] * 3
    assert os.listdir(tmp_path) == ["model_best.pth.tar"]


def test_options_become_plain_or_are_refused(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    given = {"module_name": "SGR", "data_path": tmp_path, "margin": numpy.float32(0.5), "sizes": (1, 2)}
    _save(path, opt=argparse.Namespace(**given))
    assert vars(load(path).opt) == given | {"data_path": str(tmp_path), "margin": 0.5, "sizes": [1, 2]}
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"opt\.device must be text, a number"):
        _save(path, opt=argparse.Namespace(device=torch.device("cpu")))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    _save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # writing stops half way
    try:
        with pytest.raises(OSError, match="nothing was changed") as refusal:
            _save(path, epoch=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model_best.pth.tar"
    _save(path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _save(path, epoch=8)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
