"""The plain dual encoder: the means' cosine, padding and blocks, and a run of the program on it."""

import pytest
import torch
from sgraf_cases import LENGTHS, copied, features
from training_cases import DEV, SMALL, TRAIN, WORDS

import itm_fast
from itm_fast.data import save_splits
from itm_fast.models import DualEncoder, build, checkpoint
from itm_fast.models.dual_encoder import MeanCosine
from itm_fast.training import loop, options, train


def cosines(image, caption, regions=None):
    regions = regions or [image.shape[1]] * len(image)
    v = torch.stack([x[:n].mean(0) for x, n in zip(image, regions)])
    t = torch.stack([x[:n].mean(0) for x, n in zip(caption, LENGTHS)])
    return torch.cosine_similarity(v[:, None], t[None], dim=2)


def test_is_the_cosine_of_the_means():
    image, caption = features()
    torch.testing.assert_close(MeanCosine()(image, caption, LENGTHS), cosines(image, caption), rtol=0, atol=1e-7)


def test_padding_never_leaks():
    image, caption = features()
    regions = [6, 1, 3, 6, 5]
    want = cosines(image, caption, regions)
    for t, n in enumerate(LENGTHS):
        caption[t, n:] = float("nan")
    for i, n in enumerate(regions):
        image[i, n:] = float("nan")
    image.requires_grad_()
    score = MeanCosine()(image, caption, LENGTHS, torch.tensor(regions))
    torch.testing.assert_close(score, want, rtol=0, atol=1e-7)
    score.sum().backward()
    assert image.grad.isfinite().all()


def test_blocks_do_not_change_scores():
    image, caption = features()
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    scorer = MeanCosine()
    whole = scorer(image, words, cu_seqlens)
    images, captions = scorer.image_state(image), scorer.caption_state(words, cu_seqlens)
    part = scorer.score(
        tuple(x[2:5] for x in images),
        words[cu_seqlens[1] : cu_seqlens[4]],
        cu_seqlens[1:5] - cu_seqlens[1],
        tuple(x[1:4] for x in captions),
    )
    torch.testing.assert_close(part, whole[2:5, 1:4], rtol=0, atol=1e-12)


def test_a_run_writes_a_checkpoint_that_is_evaluated(tmp_path, capsys):
    opt = options("dual", **SMALL)
    train(opt, TRAIN, DEV, WORDS, tmp_path / "run", progress=False, device="cpu")
    found = checkpoint.load(tmp_path / "run" / loop.BEST)
    model = build(found.opt)
    assert type(model) is DualEncoder
    model.load_state_dict(found.model)
    again = copied(model.txt_enc)
    assert all(torch.equal(again[name], value) for name, value in found.model[1].items())
    save_splits(tmp_path / "data.h5", {"dev": DEV})
    words = ["evaluate", "--checkpoint", str(tmp_path / "run" / loop.BEST), "--data", str(tmp_path / "data.h5")]
    from itm_fast.cli import main

    assert main([*words, "--split", "dev", "--no-progress"]) == 0
    assert "DualEncoder" in capsys.readouterr().out


def test_refusals():
    with pytest.raises(ValueError, match="DualEncoder: opt lacks grad_clip"):
        build(type(options("dual"))(system="DualEncoder"))
    with pytest.raises(ValueError, match=r"opt\.system must be one of .*DualEncoder, HGAN"):
        build(type(options("dual"))(system="CLIP"))
