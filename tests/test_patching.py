"""`itm_fast.patch` replaces what proves equal in a repository, refuses everything else, and `unpatch` restores it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_cases import NAMES, embeddings, outcome, written
from test_published_evaluators import published

import itm_fast
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.ops import hardest_negative_loss
from itm_fast.patching import _modules


@pytest.fixture
def repository(tmp_path, monkeypatch):
    yield from written(tmp_path, monkeypatch)


def test_a_repository_is_replaced_and_restored(repository, capsys):
    folder = repository()
    state = torch.get_rng_state()
    report = itm_fast.patch(folder)
    assert torch.equal(torch.get_rng_state(), state)
    model, evaluation = (sys.modules[name] for name in NAMES)
    replaced = ["i2t", "t2i", "shard_xattn_t2i", "EncoderSimilarity (SGR)", "EncoderSimilarity (SAF)"]
    replaced += ["xattn_score_t2i", "xattn_score_i2t", "ContrastiveLoss"]
    assert sorted(report.outcomes("replaced")) == sorted(replaced)
    assert sorted(report.outcomes("left alone")) == ["func_attention", "shard_attn_scores"]
    assert report.outcomes("refused") == []
    assert outcome(report, "xattn_score_t2i").detail.endswith("in 2 modules")
    assert outcome(report, "ContrastiveLoss").where.startswith("model:")
    assert capsys.readouterr().out == ""
    lines = str(report).splitlines()
    assert len(lines) == len(report) == 10
    assert any("xattn_score_t2i" in line and "replaced" in line for line in lines)

    slow = [vars(model)[name] for name in ("EncoderSimilarity", "ContrastiveLoss")]
    assert evaluation.xattn_score_t2i is model.xattn_score_t2i
    assert slow[0](16, 8, "SAF").own_method() == "SAF"
    again = itm_fast.patch(model, evaluation)
    assert again.outcomes("replaced") == []
    assert "replaced already" in outcome(again, "ContrastiveLoss").detail
    itm_fast.unpatch(model)
    assert model.xattn_score_t2i.__code__.co_filename == evaluation.xattn_score_t2i.__code__.co_filename
    assert Path(model.xattn_score_t2i.__code__.co_filename) == folder / "model.py"
    assert slow[0].forward.__qualname__ == "EncoderSimilarity.forward"
    assert hasattr(evaluation.i2t, "_itm_fast_patched")
    itm_fast.unpatch()
    assert not hasattr(evaluation.i2t, "_itm_fast_patched")


@pytest.mark.parametrize("mode", ["SGR", "SAF"])
def test_training_steps_are_the_same_with_and_without(repository, mode, monkeypatch):
    folder = repository()
    monkeypatch.syspath_prepend(str(folder))
    model = importlib.import_module("model")
    image, caption, lengths = (x.double() if isinstance(x, torch.Tensor) else x for x in embeddings())
    calls = []
    score = EncoderSimilarity.score
    monkeypatch.setattr(EncoderSimilarity, "score", lambda *given: calls.append(1) or score(*given))
    runs = []
    for patched in (False, True):
        if patched:
            itm_fast.patch(model)
            calls.clear()
        torch.manual_seed(0)
        scorer = model.EncoderSimilarity(16, 8, mode).double()
        optimizer = torch.optim.SGD(scorer.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = hardest_negative_loss(scorer(image, caption[:3], lengths[:3]), margin=0.2)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, scorer.state_dict(), scorer.eval()(image, caption, lengths)))
    assert len(calls) == 6
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-10)
    assert len(set(runs[0][0])) == 5
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-9, atol=1e-10)


def test_results_of_the_replaced_functions(repository):
    folder = repository()
    report = itm_fast.patch(folder)
    model, evaluation = (sys.modules[name] for name in NAMES)
    image, caption, lengths = embeddings()
    opt = Namespace(raw_feature_norm="clipped_l2norm", agg_func="Mean", lambda_softmax=9.0, lambda_lse=6.0)
    expected = model.scores("t2i", image, caption, lengths, opt)
    torch.testing.assert_close(evaluation.xattn_score_t2i(image, caption, lengths, opt), expected)
    found = evaluation.shard_xattn_t2i(image.numpy(), caption.numpy(), lengths, opt)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    sims = np.random.default_rng(0).random((6, 30))
    assert evaluation.i2t(np.zeros((6, 1, 1)), None, None, sims) == pytest.approx(published(sims, "i2t")[0])
    assert evaluation.t2i(6, sims, 5) == pytest.approx(published(sims, "t2i")[0])
    assert evaluation.t2i(6, sims, 5, return_ranks=True)[1][2] == "order"  # by the repository's own code
    assert "replaced" in outcome(report, "t2i").outcome


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (("cap_lens, training", "cap_lens, dropout=0.3, training"), "EncoderSimilarity (SGR)", "the results differ by"),
        (("xattn_score_t2i(images", "xattn_score_t2i(x, images"), "xattn_score_t2i", "known is (images, captions,"),
        (
            ("direction=direction", "direction=direction + '?'"),
            "xattn_score_i2t",
            "its own code fails here: ValueError",
        ),
        (("cost.clamp(min=0)", "cost.clamp(min=0.01)"), "ContrastiveLoss", "the results differ by"),
        (("def forward(self, scores)", "def forward(self, scores, labels)"), "ContrastiveLoss", "(scores, labels)"),
        (("img_emb, cap_emb, cap_lens):", "img_emb, cap_emb, cap_lens, net=None):"), "EncoderSimilarity", "net"),
        (("name, part in", "name, part in sorted("), "model.py", "Python 3 cannot read it"),
        (("import torch\n", "import torch, no_such_thing\n"), "model.py", "No module named 'no_such_thing'"),
    ],
)
def test_what_is_not_the_same_is_refused(repository, change, name, reason):
    report = itm_fast.patch(repository(change, evaluation=""))
    row = outcome(report, name)
    assert row.outcome == "refused"
    assert reason in row.detail
    if name == "EncoderSimilarity (SGR)":  # as it differs in training alone, nothing of it is replaced
        assert sys.modules["model"].EncoderSimilarity.forward.__qualname__ == "EncoderSimilarity.forward"


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ("score, score.detach().diagonal()", "scores and their diagonal"),
        ("torch.logit(score)", "logits"),
    ],
)
def test_forks_that_return_something_else(repository, returned, kind):
    change = ("return slow.loop(", "score = slow.loop(")
    tail = ("training=self.training)\n", f"training=self.training)\n        return {returned}\n")
    report = itm_fast.patch(repository(change, tail, evaluation=""))
    for mode in ("SGR", "SAF"):
        assert outcome(report, f"EncoderSimilarity ({mode})").detail.endswith(f", returns {kind}")
        scorer = sys.modules["model"].EncoderSimilarity(16, 8, mode).eval()
        found = scorer(*embeddings())
        itm_fast.unpatch()
        torch.testing.assert_close(found, scorer(*embeddings()))
        itm_fast.patch(sys.modules["model"])


def test_modules_that_differ_from_the_published_keep_their_own_forward(repository, monkeypatch):
    itm_fast.patch(repository(evaluation=""))
    cls = sys.modules["model"].EncoderSimilarity
    hooked, changed = cls(16, 8, "SGR").eval(), cls(16, 8, "SAF").eval()
    expected = hooked(*embeddings()), changed(*embeddings())
    hooked.v_global_w.register_forward_hook(lambda *given: None)
    weight = changed.sim_tranloc_w.weight.detach()
    del changed.sim_tranloc_w.weight
    changed.sim_tranloc_w.register_buffer("weight", weight)  # the library's scorer has a parameter here

    class Derived(cls):
        pass

    derived = Derived(16, 8, "SAF").eval()
    derived.load_state_dict(changed.state_dict())
    monkeypatch.setattr(EncoderSimilarity, "score", None)
    torch.testing.assert_close((hooked(*embeddings()), changed(*embeddings())), expected)
    torch.testing.assert_close(derived(*embeddings()), expected[1])


def replica(module):
    """A copy as DataParallel makes on each GPU: it has no parameters, but tensors that depend on the module's own."""
    copy = module._replicate_for_data_parallel()
    copy._former_parameters = {}
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        copy._former_parameters[name] = parameter * 1.0
        setattr(copy, name, copy._former_parameters[name])
    return copy


def test_replicas_of_data_parallel_use_the_kernels_too(repository, monkeypatch):
    itm_fast.patch(repository(evaluation=""))
    scorer = sys.modules["model"].EncoderSimilarity(16, 8, "SGR").eval()
    expected, calls, score = scorer(*embeddings()), [], EncoderSimilarity.score
    monkeypatch.setattr(EncoderSimilarity, "score", lambda *given: calls.append(1) or score(*given))
    found = replica(scorer)(*embeddings())
    assert calls == [1]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in scorer.named_parameters()}
    scorer.zero_grad()
    expected.sum().backward()
    torch.testing.assert_close(own, {name: parameter.grad for name, parameter in scorer.named_parameters()})


def test_an_import_that_has_no_effect_is_told(repository):
    line = "from itm_fast.models.sgraf import EncoderSimilarity\nimport torch\n"
    report = itm_fast.patch(repository(("import torch\n", line), evaluation=""))
    row = next(row for row in report if row.name == "EncoderSimilarity")
    assert "its import in line 2 has no effect: this definition below it overrides it" in row.detail
    assert "EncoderSimilarity (SGR)" in report.outcomes("replaced")


def test_mistakes(tmp_path, repository):
    with pytest.raises(ValueError, match=r"patch: there is no .*nowhere; give a module, or the path"):
        itm_fast.patch(tmp_path / "nowhere")
    (tmp_path / "json.py").write_text("def i2t(): pass")
    with pytest.raises(ValueError, match=r"a module json is imported from .*, not from .*json.py; start Python in"):
        itm_fast.patch(tmp_path / "json.py")
    assert str(itm_fast.patch(_modules)) == "nothing that itm_fast.patch knows is defined here"


@pytest.mark.parametrize(
    ("files", "where", "folder"),
    [
        (("its-code/model.py",), ["model:1"], "its-code"),
        (("its-code/model.py", "docs/conf.py", "venv/lib/site-packages/a/model.py"), ["model:1"], "its-code"),
        (("pkg/__init__.py", "pkg/model.py"), ["pkg.model:1"], ""),
        (("src/pkg/__init__.py", "src/pkg/model.py", "tests/test_a.py"), ["pkg.model:1"], "src"),
        (("models/model.py", "evaluation/evaluation.py"), ["evaluation.evaluation:1", "models.model:1"], ""),
        (("../linked/model.py",), ["model:1"], "../linked"),
        (("models/model.py", "scripts/from models.model import i2t.py"), ["models.model:1"], ""),
    ],
)
def test_a_repository_without_scripts_of_its_own(tmp_path, repository, files, where, folder):
    root = tmp_path / "repository"
    root.mkdir()
    for file in map(root.joinpath, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        code = file.stem if " " in file.stem else ""
        file.write_text("def i2t(npts, sims): pass" if file.stem in ("model", "evaluation") else code)
    if "linked" in folder:
        (root / "code").symlink_to(tmp_path / "linked")
    try:
        assert [row.where for row in itm_fast.patch(root)] == where
        assert sys.path[0] == str((root / folder).resolve())
    finally:
        for name in ("pkg", "pkg.model", "models", "models.model", "evaluation.evaluation"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_importing_the_library_does_not_import_the_patches():
    code = "import itm_fast, sys; itm_fast.pack; assert 'itm_fast.patching' not in sys.modules; itm_fast.patch"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_table_of_repositories(repository, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir():
        pytest.skip("needs a checkout")
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import repositories

    monkeypatch.setattr(repositories, "SIZES", (3, 4, 16, 8))
    found = repositories.repository("a/b", repository(), 1)
    assert [one["mode"] for one in found["scorers"]] == ["SGR", "SAF", "SCAN t2i"]
    for one in found["scorers"]:
        assert one["largest_difference_of_losses"] < 1e-9 < min(one["losses"])
        assert 0 < one["difference_of_gradients"] < 1e-9
        assert one["checkpoint_both_ways"] is (None if one["mode"] == "SCAN t2i" else True)
        assert one["seconds_own"] > 0
    assert not set(NAMES) & set(sys.modules)
    shown = repositories.table({"environment": repositories.environment(), "sizes": (3, 4, 16, 8), "results": [found]})
    assert "| a/b | SAF | " in shown
