"""SCAN's drop-in against its published loop, and both against vectors of the published code."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast.models import SCAN, build, scan
from itm_fast.testing import assert_accurate, op_checks
from itm_fast.testing.scan import attend, loop

GOLDEN = np.load(Path(__file__).parent / "golden" / "scan.npz", allow_pickle=False)
CASES = sorted({key.rpartition("/")[0] for key in GOLDEN})
BACKENDS = [*op_checks.backends("cross_attention_score"), "reference"]
DIRECTIONS = ["t2i", "i2t"]
LENGTHS = [2, 7, 5, 1, 7, 3]  # unsorted; 2 is <start> and <end> alone
SCALE = {"t2i": 9.0, "i2t": 4.0}


def options(**changes):
    opt = Namespace(
        grad_clip=2.0,
        data_name="toy_precomp",
        img_dim=12,
        embed_size=16,
        precomp_enc_type="basic",
        no_imgnorm=False,
        vocab_size=30,
        word_dim=10,
        num_layers=1,
        bi_gru=True,
        no_txtnorm=False,
        margin=0.2,
        max_violation=True,
        learning_rate=0.005,
        cross_attn="t2i",
        raw_feature_norm="clipped_l2norm",
        agg_func="LogSumExp",
        lambda_softmax=9.0,
        lambda_lse=6.0,
        device="cpu",
    )
    return Namespace(**{**vars(opt), **changes})


def names(opt, direction):
    """The options as the loop's arguments."""
    return {
        "direction": direction,
        "affinity_norm": scan.NORMS[opt.raw_feature_norm],
        "scale": opt.lambda_softmax,
        "pool": scan.POOLS[opt.agg_func],
        "pool_scale": opt.lambda_lse,
    }


def score(direction, *args, **kwargs):
    return {"t2i": scan.xattn_score_t2i, "i2t": scan.xattn_score_i2t}[direction](*args, **kwargs)


def features(I=5, R=6, D=16, lengths=LENGTHS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(I, R, D, generator=generator, dtype=torch.float64)
    caption = torch.randn(len(lengths), max(lengths) + 1, D, generator=generator, dtype=torch.float64)
    return scan.l2norm(image, -1).to(dtype), scan.l2norm(caption, -1).to(dtype)


def golden(case):
    return {
        name: torch.from_numpy(GOLDEN[f"{case}/{name}"])
        for name in ("image", "caption", "lengths", "score", "d_score", "d_image", "d_caption")
    }


@pytest.mark.parametrize("backend", [*BACKENDS, "loop"])
@pytest.mark.parametrize("case", CASES)
def test_published_vectors(case, backend):
    direction, norm, pool = case.split("/")
    opt = options(raw_feature_norm=norm, agg_func=pool, lambda_softmax=SCALE[direction])
    want = golden(case)
    image, caption = want["image"].requires_grad_(), want["caption"].requires_grad_()
    lengths = want["lengths"].tolist()
    if backend == "loop":
        result = loop(image, caption, lengths, **names(opt, direction))
    else:
        with itm_fast.use_backend(backend):
            result = score(direction, image, caption, lengths, opt)
    result.backward(want["d_score"])
    torch.testing.assert_close(result, want["score"], rtol=0, atol=1e-10)
    torch.testing.assert_close(image.grad, want["d_image"], rtol=0, atol=1e-8)
    torch.testing.assert_close(caption.grad, want["d_caption"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", scan.POOLS)
@pytest.mark.parametrize("norm", scan.NORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_the_loop_on_ragged_captions(direction, norm, pool, backend):
    opt = options(raw_feature_norm=norm, agg_func=pool, lambda_softmax=SCALE[direction])
    image, caption = features()
    with itm_fast.use_backend(backend):
        result = score(direction, image, caption, LENGTHS, opt)
    torch.testing.assert_close(result, loop(image, caption, LENGTHS, **names(opt, direction)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_is_as_accurate_as_the_loop(direction):
    image, caption = features(D=128, dtype=torch.float32)
    opt = options(lambda_softmax=SCALE[direction])

    def looped(dtype):
        return [loop(image.to(dtype), caption.to(dtype), LENGTHS, **names(opt, direction))]

    assert_accurate([score(direction, image, caption, torch.tensor(LENGTHS), opt)], looped, torch.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_never_leaks(direction):
    image, caption = features()
    regions = [6, 1, 3, 6, 5]
    opt = options(lambda_softmax=SCALE[direction])
    want = torch.cat(
        [loop(image[i : i + 1, :n], caption, LENGTHS, **names(opt, direction)) for i, n in enumerate(regions)]
    )
    for t, n in enumerate(LENGTHS):
        caption[t, n:] = float("nan")
    for i, n in enumerate(regions):
        image[i, n:] = float("nan")
    image.requires_grad_()
    caption.requires_grad_()
    result = score(direction, image, caption, LENGTHS, opt, torch.tensor(regions))
    torch.testing.assert_close(result, want, rtol=0, atol=1e-12)
    result.sum().backward()
    assert not image.grad[1, 1:].any()
    assert not caption.grad[0, 2:].any()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("norm", scan.NORMS)
def test_func_attention_is_the_loops_attention(norm):
    image, caption = features()
    query = caption[:5]
    attended, attention = scan.func_attention(query, image, options(raw_feature_norm=norm), smooth=9.0)
    want = attend(query, image, scan.NORMS[norm], 9.0)
    torch.testing.assert_close(attended, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.bmm(attention.transpose(1, 2), image), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shards_are_the_loop_in_the_dtype_of_models_whatever_the_shard_size(direction, dtype, default, monkeypatch):
    """Published evaluators collect a float32 model's embeddings in float64 arrays, which no kernel on a GPU takes."""
    image, caption = features()
    opt = options(lambda_softmax=SCALE[direction])
    want = loop(image, caption, LENGTHS, **names(opt, direction)).numpy()
    shard = {"t2i": scan.shard_xattn_t2i, "i2t": scan.shard_xattn_i2t}[direction]
    seen = []
    real = scan.CrossAttentionScore.score
    monkeypatch.setattr(
        scan.CrossAttentionScore,
        "score",
        lambda self, state, words, *more: seen.append((state[0].dtype, words.dtype)) or real(self, state, words, *more),
    )
    torch.set_default_dtype(default)
    try:
        for size in (2, 128):
            found = shard(image.numpy().astype(dtype), caption.numpy().astype(dtype), LENGTHS, opt, shard_size=size)
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.float64
            scored = default if dtype == np.float64 else torch.float32
            assert seen.pop() == (scored, scored)
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 if scored == torch.float32 else 1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scorer_is_the_loop_of_its_options():
    image, caption = features()
    opt = options(cross_attn="i2t", agg_func="Mean", lambda_softmax=4.0)
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    found = SCAN(opt).scorer(image, words, cu_seqlens)
    torch.testing.assert_close(found, loop(image, caption, LENGTHS, **names(opt, "i2t")), rtol=0, atol=1e-12)


KEYS = {"basic": ["fc.weight", "fc.bias"], "weight_norm": ["fc.bias", "fc.weight_g", "fc.weight_v"]}


@pytest.mark.parametrize("kind,keys", KEYS.items(), ids=KEYS)
def test_state_dict_is_the_published_list(kind, keys):
    model = SCAN(options(precomp_enc_type=kind))
    image, text = model.state_dict()
    assert list(image) == keys
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    gru = [f"rnn.{part}_l0{way}" for way in ("", "_reverse") for part in parts]
    assert list(text) == ["embed.weight", *gru]
    other = SCAN(options(precomp_enc_type=kind))
    other.load_state_dict([{**image, "another.model": torch.zeros(1)}, text])
    features = torch.randn(2, 3, 12)
    torch.testing.assert_close(other.img_enc(features), model.img_enc(features), rtol=0, atol=0)


def test_state_of_another_model_is_refused():
    model = SCAN(options())
    with pytest.raises(ValueError, match=r"list of 2 state_dicts \(img_enc, txt_enc\), got 3"):
        model.load_state_dict([*model.state_dict(), {}])


def test_weight_norm_is_torchs():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 16)
    torch.manual_seed(0)
    encoder = scan.EncoderImage("toy_precomp", 12, 16, "weight_norm", no_imgnorm=True)
    with torch.no_grad():
        encoder.fc.weight_g.mul_(3)
    features = torch.randn(2, 3, 12)
    want = torch.nn.functional.linear(features, 3 * linear.weight, linear.bias)
    torch.testing.assert_close(encoder(features), want)
    old = {**encoder.state_dict(), "fc.weight_g": encoder.fc.weight_g.detach().reshape(1)}  # as torch 0.3 saved it
    encoder.load_state_dict(old)


def test_text_encoder_takes_captions_in_any_order():
    torch.manual_seed(0)
    encoder = scan.EncoderText(30, 10, 16, 1, use_bi_gru=True)
    ids = torch.randint(1, 30, (4, 9))
    lengths = [3, 9, 2, 5]
    padded, found = encoder(ids, lengths)
    assert found.tolist() == lengths
    for row, (sentence, n) in enumerate(zip(ids, lengths, strict=True)):
        ways = encoder.rnn(encoder.embed(sentence[:n]))[0]
        alone = scan.l2norm((ways[:, :16] + ways[:, 16:]) / 2, -1)
        torch.testing.assert_close(padded[row, :n], alone)
        assert not padded[row, n:].any()


class Logger:
    def __init__(self):
        self.seen = {}

    def update(self, name, value, n=0):
        self.seen.setdefault(name, []).append((value, n))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_train_emb_learns_a_batch(direction):
    torch.manual_seed(0)
    model = build(options(cross_attn=direction))
    assert type(model) is SCAN
    model.logger = Logger()
    model.train_start()
    images, ids = torch.randn(8, 5, 12), torch.randint(1, 30, (8, 6))
    lengths = [6, 6, 5, 5, 4, 3, 3, 2]
    for _ in range(40):
        model.train_emb(images, ids, lengths, list(range(8)))
    losses = [value for value, n in model.logger.seen["Le"] if n == 8]
    assert losses[-1] < 0.5 * losses[0]
    assert model.Eiters == 40
    assert model.logger.seen["lr"][0] == (0.005, 0)
    assert model.logger.seen["Eit"][-1] == (40, 0)
    model.val_start()
    assert not model.img_enc.training
    image, caption, found = model.forward_emb(images, ids, lengths, volatile=True)
    assert not image.requires_grad
    assert caption.shape == (8, 6, 16)
    assert list(found) == lengths


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    scan.l2norm(x, dim=-1)[0].sum().backward()
    assert not x.grad[1].any()
    assert x.grad.isfinite().all()


def test_loss_is_the_papers():
    image, caption = features(I=6)
    for hardest in (False, True):
        opt = options(max_violation=hardest)
        s = loop(image, caption, LENGTHS, **names(opt, "t2i"))
        off = ~torch.eye(6, dtype=torch.bool)
        caption_cost = (0.2 + s - s.diag()[:, None]).clamp(min=0) * off
        image_cost = (0.2 + s - s.diag()[None, :]).clamp(min=0) * off
        if hardest:
            caption_cost, image_cost = caption_cost.max(1).values, image_cost.max(0).values
        found = scan.ContrastiveLoss(opt, margin=0.2, max_violation=hardest)(image, caption, LENGTHS)
        torch.testing.assert_close(found, caption_cost.sum() + image_cost.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name,value",
    [("cross_attn", "both"), ("agg_func", "LSE"), ("raw_feature_norm", "l3norm"), ("precomp_enc_type", "vit")],
)
def test_unknown_options_are_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        SCAN(options(**{name: value}))


def test_missing_options_are_named():
    opt = options()
    del opt.lambda_lse, opt.margin
    with pytest.raises(ValueError, match="SCAN: opt lacks margin, lambda_lse"):
        SCAN(opt)
    with pytest.raises(ValueError, match="neither module_name"):
        build(Namespace(img_dim=3))


def test_autocast_runs_and_learns():
    torch.manual_seed(0)
    model = SCAN(options())
    images, ids, lengths = torch.randn(4, 5, 12), torch.randint(1, 30, (4, 6)), [6, 5, 3, 2]
    want = model.forward_loss(*model.forward_emb(images, ids, lengths)).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.forward_loss(*model.forward_emb(images, ids, lengths))
    assert abs(loss.item() - want) < 0.1
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.params)
