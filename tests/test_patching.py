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
from test_published_evaluators import published

import itm_fast
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.ops import hardest_negative_loss
from itm_fast.patching import _modules

MODEL = """
import torch
from torch import nn
from itm_fast.models import sgraf
from itm_fast.testing import scan, sgraf as slow

NORMS = {"no_norm": "none"}
POOLS = {"LogSumExp": "lse", "Max": "max", "Sum": "sum", "Mean": "mean"}

class EncoderSimilarity(nn.Module):
    def __init__(self, embed_size, sim_dim, module_name="AVE", sgr_step=3):
        super().__init__()
        self.module_name = module_name
        for name, part in sgraf.EncoderSimilarity(embed_size, sim_dim, module_name, sgr_step).named_children():
            self.add_module(name, part)

    def forward(self, img_emb, cap_emb, cap_lens):
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return slow.loop(state, img_emb, cap_emb, cap_lens, training=self.training)

    def own_method(self):
        return self.module_name

def scores(direction, images, captions, cap_lens, opt):
    return scan.loop(
        images, captions, cap_lens, direction=direction, affinity_norm=NORMS.get(opt.raw_feature_norm, opt.raw_feature_norm),
        scale=opt.lambda_softmax, pool=POOLS[opt.agg_func], pool_scale=opt.lambda_lse,
    )

def xattn_score_t2i(images, captions, cap_lens, opt):
    return scores("t2i", images, captions, cap_lens, opt)

def xattn_score_i2t(images, captions, cap_lens, opt):
    if opt.raw_feature_norm.endswith("l1norm"):
        raise NameError("name 'l1norm_d' is not defined")
    return scores("i2t", images, captions, cap_lens, opt)

def func_attention(query, context, opt, smooth, eps=1e-8):
    pass

class ContrastiveLoss(nn.Module):
    def __init__(self, margin=0, max_violation=False):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def forward(self, scores):
        right = scores.diagonal()
        cost = torch.stack([self.margin + scores - right[:, None], self.margin + scores - right])
        cost = cost.clamp(min=0).masked_fill(torch.eye(len(scores)).cuda() > 0.5, 0)
        return cost[0].amax(1).sum() + cost[1].amax(0).sum() if self.max_violation else cost.sum()
"""  # noqa: E501
EVALUATION = """
import numpy as np
import torch
import model
from model import xattn_score_t2i
from test_published_evaluators import published

def shard_xattn_t2i(images, captions, caplens, opt, shard_size=128):
    print("shard")
    score = xattn_score_t2i(torch.from_numpy(images).cuda(), torch.from_numpy(captions).cuda(), caplens, opt)
    return score.numpy()

def shard_attn_scores(model, img_embs, cap_embs, cap_lens, opt, shard_size=100):
    pass

def i2t(images, captions, caplens, sims, npts=None, return_ranks=False):
    found = published(sims, "i2t")
    return found if return_ranks else found[0]

def t2i(npts, sims, per_captions=1, return_ranks=False):
    found = published(sims, "t2i")
    return (found[0], (*found[1], "order")) if return_ranks else found[0]
"""
NAMES = ("model", "evaluation")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Write the two files with changes, (old, new) for each; `patch` imports them."""

    def write(*changes, evaluation=EVALUATION):
        text = MODEL
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "model.py").write_text(text)
        (tmp_path / "evaluation.py").write_text(evaluation)
        return tmp_path

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    itm_fast.unpatch()
    for name in NAMES:
        sys.modules.pop(name, None)


def outcome(report, name):
    [row] = [row for row in report if row.name == name]
    return row


def embeddings():
    generator = torch.Generator().manual_seed(0)
    unit = [
        torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=2)
        for shape in ((3, 36, 16), (4, 6, 16))
    ]
    return *unit, [6, 4, 3, 2]


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
        assert one["checkpoint_both_ways"] is (None if one["mode"] == "SCAN t2i" else True)
        assert one["seconds_own"] > 0
    assert not set(NAMES) & set(sys.modules)
    shown = repositories.table({"environment": repositories.environment(), "sizes": (3, 4, 16, 8), "results": [found]})
    assert "| a/b | SAF | " in shown
