"""SGRAF's evaluator and trainer objects as users of the published code call them, and what they refuse."""

import numpy as np
import pytest
import torch
from sgraf_cases import HEADS, LENGTHS, D, R, S, features, options

from itm_fast.models import SCAN, SGRAF, build, sgraf
from itm_fast.testing.sgraf import loop


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("head", HEADS)
def test_shards_are_the_loop_in_the_models_dtype_whatever_the_shard_size(head, dtype, monkeypatch):
    model = SGRAF(options(module_name=head))
    model.val_start()
    image, caption = features()
    want = loop(model.sim_enc.state_dict(), image.float(), caption.float(), LENGTHS)
    seen = []
    real = model.sim_enc.score
    monkeypatch.setattr(
        model.sim_enc, "score", lambda state, words, *more: seen.append(words.dtype) or real(state, words, *more)
    )
    arrays = (image.numpy().astype(dtype), caption.numpy().astype(dtype))
    for size in (2, 100):
        found = sgraf.shard_attn_scores(model, *arrays, LENGTHS, options(), shard_size=size)
        assert seen.pop() == torch.float32
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=1e-6)


class Logger:
    def __init__(self):
        self.seen = {}

    def update(self, name, value, n=0):
        self.seen.setdefault(name, []).append((value, n))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_train_emb_learns_a_batch(head):
    torch.manual_seed(0)
    opt = options(module_name=head, embed_size=64, sim_dim=64, learning_rate=0.005)
    model = build(opt)
    assert type(model) is SGRAF
    assert model.scorer is model.sim_enc
    model.logger = Logger()
    images, ids = torch.randn(6, R, 12), torch.randint(1, 30, (6, 6))
    lengths = [6, 6, 5, 4, 3, 2]
    for _ in range(50):
        model.train_start()
        model.train_emb(images, ids, lengths, list(range(6)))
    losses = [value for value, n in model.logger.seen["Loss"] if n == 6]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert model.Eiters == 50
    assert model.logger.seen["Eit"][-1] == (50, 0)
    assert model.logger.seen["lr"][0] == (0.005, 0)
    assert len({id(p) for p in model.params}) == sum(len(list(m.parameters())) for m in model.modules)
    if head == "SAF":
        assert model.sim_enc.SAF_module.bn.num_batches_tracked == 50 * 6

    model.val_start()
    other = SGRAF(opt)
    other.load_state_dict(model.state_dict())
    other.val_start()
    with torch.no_grad():
        image, caption, found = model.forward_emb(images, ids, lengths)
        assert found is lengths
        torch.testing.assert_close(
            other.forward_sim(*other.forward_emb(images, ids, lengths)),
            model.forward_sim(image, caption, found),
            rtol=0,
            atol=0,
        )


def test_train_emb_takes_region_lengths():
    torch.manual_seed(0)
    model = SGRAF(options())
    model.train_start()
    images = torch.randn(3, R, 12)
    images[0, 2:] = float("nan")
    loss = model.train_emb(images, torch.randint(1, 30, (3, 4)), [4, 3, 2], region_lengths=torch.tensor([2, R, R]))
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.params)


def test_autocast_runs_and_learns():
    torch.manual_seed(0)
    model = SGRAF(options(module_name="SAF"))
    images, ids, lengths = torch.randn(4, R, 12), torch.randint(1, 30, (4, 6)), [6, 5, 3, 2]
    model.val_start()
    want = model.forward_sim(*model.forward_emb(images, ids, lengths))
    with torch.autocast("cpu", torch.bfloat16):
        score = model.forward_sim(*model.forward_emb(images, ids, lengths))
        loss = model.forward_loss(score)
    assert (score - want).abs().max() < 0.02
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.params)


@pytest.mark.parametrize("kind, parts", [(SGRAF, ("txt_enc", "img_enc", "sim_enc")), (SCAN, ("txt_enc", "img_enc"))])
def test_the_optimizer_holds_the_parameters_in_the_published_order(kind, parts):
    """A saved optimizer's moments are matched by position."""
    scan = {"cross_attn": "t2i", "raw_feature_norm": "l2norm", "agg_func": "Mean", "precomp_enc_type": "basic"}
    model = kind(options(lambda_softmax=9.0, lambda_lse=6.0, **scan))
    published = [p for part in parts for p in getattr(model, part).parameters()]
    (group,) = model.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in published] == [id(p) for p in model.params]


def test_refusals():
    for name in ("AVE", "sgr"):
        with pytest.raises(ValueError, match=f"module_name must be one of SGR, SAF, got '{name}'"):
            SGRAF(options(module_name=name))
    with pytest.raises(ValueError, match="module_name must be one of SGR, SAF, got 'AVE'"):
        sgraf.EncoderSimilarity(D, S)
    opt = options()
    del opt.sim_dim
    with pytest.raises(ValueError, match="SGRAF: opt lacks sim_dim"):
        SGRAF(opt)
    with pytest.raises(ValueError, match="list of 3 state_dicts"):
        SGRAF(options()).load_state_dict([{}, {}])
