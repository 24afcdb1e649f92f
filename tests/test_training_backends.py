"""Every model trains and validates with the backend asked for, however it is asked for."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from training_cases import SMALL, run_tiny, tiny_split
from triton_cases import unless

import itm_fast
from itm_fast._backends import OFFERS
from itm_fast.models import build
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.ops import _register
from itm_fast.training import options

TINY = {**SMALL, "embed_size": 8, "batch_size": 4, "num_epochs": 1}
EVERY_MODEL = {
    "scan t2i": options("scan", **TINY),
    "scan i2t": options("scan", direction="i2t", **TINY),
    "sgr": options("sgr", sim_dim=4, sgr_step=1, **TINY),
    "saf": options("saf", sim_dim=4, **TINY),
    "imram": options("imram", model_mode="full_IMRAM", iteration_step=2, **TINY),
    "rcar": options("rcar", sim_dim=4, **TINY),
    "cmcan": options("cmcan", sim_dim=4, self_layers=1, **TINY),
    "shan": options("shan", **TINY),
    "hgan": options("hgan", granularities=[2], graph_layers=1, **TINY),
    "tshsr": options("tshsr", sim_dim=4, context_nodes=[2], sgr_step=1, **TINY),
    "bfan": options("bfan", **TINY),
    "chan": options("chan", **TINY),
    "naaf": options("naaf", **TINY),
    "maxsim": options("maxsim", **TINY),
    "dual": options("dual", **TINY),
}
NOT_TRITON = ("bfan", "chan", "naaf", "maxsim")


def test_every_model_is_here():
    assert {name.split()[0] for name in EVERY_MODEL} == set(CATALOGUE)


@pytest.fixture
def ran(monkeypatch):
    """(op, backend) of every op that runs."""
    seen, real = set(), _register.resolve

    def resolve(op, *args):
        name = real(op, *args)
        seen.add((op, name))
        return name

    monkeypatch.setattr(_register, "resolve", resolve)
    return seen


def _expected(ran, backend):
    return {(op, next(name for name in (backend, "cpu", "torch") if name in OFFERS[op])) for op, _ in ran}


@pytest.mark.parametrize("asked", ["argument", "environment", "context"])
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_every_model_trains_with_the_compiled_kernels(tmp_path, monkeypatch, ran, model, asked):
    if asked == "environment":
        monkeypatch.setenv("ITM_FAST_BACKEND", "cpu")
    argument = {"backend": "cpu"} if asked == "argument" else {}
    with itm_fast.use_backend("cpu") if asked == "context" else nullcontext():
        result = run_tiny(tmp_path / "run", opt=EVERY_MODEL[model], max_steps=1, **argument)
    assert result.iterations == 1
    assert result.best_rsum is not None
    assert ("hardest_negative_loss", "torch") in ran
    assert ran == _expected(ran, "cpu")
    assert len(ran) > 1 or model == "dual"


@pytest.mark.slow
@unless("triton", "cpu")
@pytest.mark.parametrize("model", [name for name in EVERY_MODEL if name not in NOT_TRITON])
def test_every_model_steps_with_the_triton_kernels(ran, model):
    """Under the interpreter, which is slow: one step, of the model's own training code."""
    torch.manual_seed(0)
    regions = {} if model in ("scan t2i", "scan i2t", "imram", "rcar", "shan", "dual") else {"num_region": 2}
    opt = Namespace(**vars(EVERY_MODEL[model]), vocab_size=9, device="cpu", **regions)
    built = build(opt)
    built.train_start()
    before = [p.detach().clone() for p in built.params]
    with itm_fast.use_backend("triton"):
        loss = built.train_emb(torch.randn(2, 2, opt.img_dim), torch.tensor([[4, 5], [6, 0]]), [2, 1])
    assert loss.isfinite()
    assert any(not torch.equal(p, b) for p, b in zip(built.params, before, strict=True))
    assert ran == _expected(ran, "triton")
    assert len(ran) > 1 or model == "dual"


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got cpu"):
        run_tiny(tmp_path / "run", opt=EVERY_MODEL["dual"], backend="cuda")
    monkeypatch.setenv("ITM_FAST_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="the backend cuda cannot run on cpu: needs CUDA tensors"):
        run_tiny(tmp_path / "run", train_split=tiny_split(0, 4), opt=EVERY_MODEL["dual"])
    assert not (tmp_path / "run").exists()
