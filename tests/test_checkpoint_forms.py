"""Checkpoints as repositories built upon SGRAF and SCAN write them, and what stands where a checkpoint should."""

from __future__ import annotations

import argparse
import collections
import math
import os
import socket

import pytest
import torch

from itm_fast.models import build
from itm_fast.models.checkpoint import load, load_all
from itm_fast.training import options

OPT = options("saf", img_dim=6, embed_size=8, word_dim=4, sim_dim=4)


def states(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return build(argparse.Namespace(**vars(OPT), vocab_size=9, device="cpu")).state_dict()


def write(folder, **content):
    path = folder / "model_best.pth.tar"
    torch.save({"opt": OPT, **content}, path)
    return path


def same(found, expected):
    assert len(found.model) == len(expected)
    for mine, theirs in zip(found.model, expected, strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_two_networks_are_two_checkpoints(tmp_path):
    a, b = states(1), states(2)
    path = write(tmp_path, epoch=3, model_A=a, model_B=b, best_rsum=12.0)
    found = load_all(path)
    assert [(one.name, one.epoch, one.best_rsum, one.iterations) for one in found] == [
        ("A", 3, 12.0, None),
        ("B", 3, 12.0, None),
    ]
    same(found[0], a)
    same(found[1], b)
    with pytest.raises(ValueError, match=r"holds 2 networks \(A, B\), whose scores are averaged; `load_all` reads"):
        load(path)


def test_model_comes_before_other_names_that_begin_with_it(tmp_path):
    path = write(tmp_path, model=states(1), model_A=states(2), model_name="runs/x")
    same(load(path), states(1))


def test_a_path_that_begins_with_model_is_no_network(tmp_path):
    with pytest.raises(ValueError, match="a dict of opt, model_name without model; a checkpoint is"):
        load(write(tmp_path, model_name="runs/x"))


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("form", ["list", "tuple", "by part", "flat"])
def test_the_state_may_be_kept_in_other_forms(tmp_path, form, wrapped, key):
    parts, names = states(), ("img_enc", "txt_enc", "sim_enc")
    prefix = "module." if wrapped else ""
    kept = [collections.OrderedDict((prefix + n, v) for n, v in part.items()) for part in parts]
    content = {
        "list": kept,
        "tuple": tuple(kept),
        "by part": dict(zip(reversed(names), reversed(kept), strict=True)),
        "flat": {f"{prefix}{name}.{n}": v for name, part in zip(names, parts, strict=True) for n, v in part.items()},
    }[form]
    same(load(write(tmp_path, **{key: content})), parts)


def test_a_flat_state_of_unknown_parts_is_refused(tmp_path):
    flat = {f"encoder.{name}": value for name, value in states()[0].items()}
    with pytest.raises(ValueError, match=r"model must be a list of state dicts, holds a bare state dict"):
        load(write(tmp_path, model=flat))


def test_options_may_be_a_dict(tmp_path):
    path = write(tmp_path, model=states(), opt=vars(OPT))
    assert load(path).opt == OPT


@pytest.mark.parametrize(
    "odd",
    [
        *("7", math.nan, math.inf, None, [1], torch.ones(2), torch.ones(1, device="meta")),
        pytest.param(10**400, id="beyond all floats"),
    ],
)
@pytest.mark.parametrize("key, attribute", [("epoch", "epoch"), ("best_rsum", "best_rsum"), ("Eiters", "iterations")])
def test_what_scoring_does_not_read_may_be_odd(tmp_path, key, attribute, odd):
    assert getattr(load(write(tmp_path, model=states(), **{key: odd})), attribute) is None
    assert getattr(load(write(tmp_path, model=states())), attribute) is None
    found = getattr(load(write(tmp_path, model=states(), **{key: torch.tensor(5)})), attribute)
    assert (found, type(found)) == (5, float if key == "best_rsum" else int)


@pytest.mark.parametrize("system", ["SGRAFX", ["SGRAF"], 3, None])
def test_an_unknown_system_is_named_with_the_file(tmp_path, system):
    path = write(tmp_path, model=states(), opt=argparse.Namespace(system=system))
    with pytest.raises(ValueError, match=r"^.*model_best\.pth\.tar: ") as refusal:
        load(path)
    assert str(path) in str(refusal.value)


def _quantised():
    return torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    "tensor, kind",
    [
        (lambda: torch.empty(3, 4, device="meta"), "a tensor on the meta device"),
        (lambda: torch.eye(3).to_sparse(), "a sparse or nested tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse or nested tensor"),
        (_quantised, "a quantised tensor"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "a complex tensor"),
        (lambda: torch.zeros(1).expand(10**9, 300), "a tensor of shape [1000000000, 300] of which the"),
    ],
    ids=["meta", "sparse", "csr", "quantised", "complex", "expanded"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_named(tmp_path, tensor, kind):
    model = states()
    model[1]["embed.weight"] = tensor()
    with pytest.raises(ValueError) as refusal:
        load(write(tmp_path, model=model))
    assert "model_best.pth.tar: model[1]['embed.weight'] is " + kind in str(refusal.value)


def test_a_folder_means_its_best_checkpoint(tmp_path):
    path = write(tmp_path, model=states())
    found = load(tmp_path)
    assert found.path == str(path)
    path.rename(tmp_path / "checkpoint.pth.tar")
    (tmp_path / "log.csv").touch()
    with pytest.raises(ValueError, match=r"without model_best.pth.tar; it holds checkpoint.pth.tar, log.csv. Give"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds nothing"):
        load(tmp_path / "empty")


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"is a FIFO, and a regular file is needed: .*pipe"):
        load(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"is a device, .*/dev/zero"):
        load("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("door")
        with pytest.raises(OSError, match=r"is a socket, .*door"):
            load("door")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "model_best.pth.tar")
    with pytest.raises(ValueError, match=r"it holds model_best\.pth\.tar"):
        load(tmp_path / "run")
