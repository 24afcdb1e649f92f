"""The models that are neither SCAN nor SGRAF: from the command line to a checkpoint and its evaluation."""

from argparse import Namespace

import pytest
import torch
from training_cases import DEV, SMALL, TRAIN, WORDS, tensors_of

from itm_fast.cli import main
from itm_fast.data import save_splits
from itm_fast.evaluation import encode, metrics, score_all
from itm_fast.models import build, model_class
from itm_fast.models.checkpoint import load
from itm_fast.training import checkpoint, loop, options, resume, train

SYSTEMS = {"hgan": "HGAN", "tshsr": "TSHSR"}
PARTS = {"hgan": 3, "tshsr": 3}


def small(name, **changes):
    return options(name, **{**SMALL, **({"sim_dim": 8} if name == "tshsr" else {}), **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_learns_and_its_checkpoint_is_evaluated(name, tmp_path, capsys):
    opt = small(name, num_epochs=6, learning_rate=5e-3)
    train(opt, TRAIN, DEV, WORDS, tmp_path / "run", progress=False, device="cpu")
    found = load(tmp_path / "run" / loop.BEST)
    assert len(found.model) == PARTS[name]
    model = build(Namespace(**vars(found.opt), device="cpu"))
    assert type(model).__name__ == SYSTEMS[name] == model_class(found.opt).__name__
    model.load_state_dict(found.model)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(model.state_dict()), tensors_of(found.model), strict=True))
    recall = metrics(
        score_all(model.scorer, encode(model, DEV, WORDS, progress=False), progress=False), DEV.caption_to_image
    )
    assert recall.rsum == pytest.approx(found.best_rsum)
    save_splits(tmp_path / "data.h5", {"dev": DEV})
    words = ["evaluate", "--checkpoint", str(tmp_path / "run" / loop.BEST), "--data", str(tmp_path / "data.h5")]
    assert main([*words, "--split", "dev", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert SYSTEMS[name] in out
    assert f"{found.best_rsum:.1f}" in out
    assert main([*words, "--split", "dev", "--no-progress", "--dry-run"]) == 0
    assert "states computed once" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    for folder, steps in (("whole", None), ("parts", 4)):
        train(small(name), TRAIN, DEV, WORDS, tmp_path / folder, progress=False, device="cpu", max_steps=steps)
    assert resume.load(tmp_path / "parts").iterations == 4
    train(small(name), TRAIN, DEV, WORDS, tmp_path / "parts", progress=False, device="cpu", resuming=True)
    a, b = (resume.load(tmp_path / folder) for folder in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(a.model), tensors_of(b.model), strict=True))


def test_every_option_reaches_the_model(tmp_path, capsys):
    save_splits(tmp_path / "tiny.h5", {"train": TRAIN, "dev": DEV})
    common = "--embed-size 16 --word-dim 8 --batch-size 8 --epochs 1 --max-steps 1 --min-count 1 --device cpu --quiet"
    of_hgan = "--graph-layers 1 --granularities 2 8 --levels 1 0.5 2 --lambda-t2i 5 --lambda-i2t 6 --lambda-global 3"
    of_hgan += " --share-local 0.3 --share-global 0.8"
    of_tshsr = "--sim-dim 8 --context-nodes 3 2 --sgr-steps 2 --lambda-t2i 5 --lambda-i2t 6"
    for name, more in (("hgan", of_hgan), ("tshsr", of_tshsr)):
        words = ["train", "--model", name, "--data", str(tmp_path / "tiny.h5"), "--output", str(tmp_path / name)]
        assert main([*words, *common.split(), *more.split()]) == 0, capsys.readouterr().err
    hgan, tshsr = (build(load(tmp_path / name / loop.BEST).opt).scorer for name in ("hgan", "tshsr"))
    assert (len(hgan.v_graph), [len(w) for w in hgan.mfar.weight], hgan.levels) == (1, [2, 8], (1.0, 0.5, 2.0))
    assert (hgan.scale_t2i, hgan.scale_i2t, hgan.scale_global) == (5.0, 6.0, 3.0)
    assert (hgan.share_local, hgan.share_global) == (0.3, 0.8)
    assert (tshsr.sizes, len(tshsr.t2i.graph), tshsr.sim_tranglo_w.out_features) == ([3, 2], 2, 8)
    assert (tshsr.scale_t2i, tshsr.scale_i2t) == (5.0, 6.0)


def test_help_says_what_is_reconstructed(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "reconstructed from the abstract: the equations are not public to us" in capsys.readouterr().out


@pytest.mark.parametrize("name", SYSTEMS)
def test_refusals(name, tmp_path):
    with pytest.raises(ValueError, match=f"{SYSTEMS[name]}: opt lacks"):
        build(Namespace(**{k: v for k, v in vars(small(name)).items() if not k.startswith("lambda")}, vocab_size=9))
    with pytest.raises(ValueError, match="has no option sgr_step" if name == "hgan" else "has no option granularities"):
        small(name, **({"sgr_step": 1} if name == "hgan" else {"granularities": [1]}))
    states = [{"a": torch.zeros(1)}] * 2
    checkpoint.save(
        tmp_path / "x.pth.tar", epoch=0, model=states, best_rsum=1.0, opt=Namespace(system=SYSTEMS[name]), iterations=1
    )
    with pytest.raises(ValueError, match=rf"opt\.system says {SYSTEMS[name]}, whose model is 3 state dicts"):
        load(tmp_path / "x.pth.tar")
