"""What repositories that copy SGRAF's scorer change in it: logits for the loss, scores of matching pairs alone."""

import numpy as np
import pytest
import torch
from model_cases import MODELS, PUBLISHED
from sgraf_cases import HEADS, LENGTHS, D, R, S, dropout, features

import itm_fast
from itm_fast.evaluation import Encoded, score_all
from itm_fast.models import forks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_what_the_sigmoid_takes(head, training):
    image, caption = features()
    model = MODELS[head].scorer().train(training)
    dropout(model, 0.0)
    score = model(image, caption, LENGTHS)
    said = repr(model)
    model.output = "logit"
    logit = model(image, caption, LENGTHS)
    torch.testing.assert_close(model.sigmoid(logit), score, rtol=0, atol=1e-12)
    assert logit.max() > 1 or logit.min() < 0
    assert repr(model) != said  # the checksum that names a score file reads it
    assert not any("sigmoid" in name for name in model.state_dict())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_z_is_what_the_last_layer_takes(head, training):
    image, caption = features()
    model = MODELS[head].scorer().train(training)
    dropout(model, 0.0)
    score, said = model(image, caption, LENGTHS), repr(model)
    model.output = "z"
    z = model(image, caption, LENGTHS)
    assert z.shape == (len(image), len(LENGTHS), S)
    torch.testing.assert_close(model.sim_eval_w(z)[..., 0].sigmoid(), score, rtol=0, atol=1e-12)
    assert repr(model) != said
    assert model(image, caption[:0], []).shape == (len(image), 0, S)


@pytest.mark.parametrize("head", HEADS)
def test_outputs_that_cannot_be_are_refused_by_name(head):
    image, caption = features()
    scorer = MODELS[head].scorer().eval()
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    encoded = Encoded(image, None, words, cu_seqlens, np.zeros(len(LENGTHS), np.int64))
    scorer.output = "z"
    with pytest.raises(ValueError, match=r"scorer\.output is 'z', vectors and not scores; set it to 'score'"):
        score_all(scorer, encoded, progress=False)
    scorer.output = "logits"
    with pytest.raises(ValueError, match="EncoderSimilarity: output must be one of score, logit, z, got 'logits'"):
        scorer(image, caption, LENGTHS)


@pytest.mark.parametrize("kind", [*PUBLISHED, "SCAN"])
@torch.no_grad()
def test_matching_pairs_are_the_diagonal_bit_for_bit(kind):
    image, caption = features(I=len(LENGTHS))
    scorer = (itm_fast.nn.CrossAttentionScore() if kind == "SCAN" else MODELS[kind].scorer()).eval()
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    regions = torch.tensor([R, 2, R, 1, 3, R, R])
    with itm_fast.use_backend("cpu"):
        want = scorer(image, words, cu_seqlens, regions).diagonal()
        found = scorer.matched(image, words, cu_seqlens, regions)
    assert found.equal(want)
    assert scorer.matched(image[:0], words[:0], cu_seqlens[:1]).shape == (0,)


@pytest.mark.parametrize("head", HEADS)
def test_matching_pairs_in_training_have_their_own_statistics(head):
    image, caption = features(I=len(LENGTHS))
    models = [MODELS[head].scorer().train() for _ in range(2)]
    for model in models:
        dropout(model, 0.0)
    found = models[0].matched(image, caption, LENGTHS)
    found.sum().backward()
    # As the published loop over pairs does: global vectors from the whole batch, then pair by pair.
    model = models[1]
    image_global = model.image_state(image)[1]
    want = []
    for i, n in enumerate(LENGTHS):
        words, edge = caption[i, :n], torch.tensor([0, n])
        state = image[i : i + 1], image_global[i : i + 1]
        want.append(model.score(state, words, edge, model.caption_state(words, edge))[0, 0])
    torch.stack(want).sum().backward()
    torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=1e-12)
    for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)
    for a, b in zip(models[0].buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_matching_needs_one_caption_per_image():
    image, caption = features(I=3)
    with pytest.raises(ValueError, match=r"EncoderSimilarity\.matched: one caption per image is needed, got 3 and 7"):
        MODELS["SGR"].scorer().matched(image, caption, LENGTHS)


@pytest.mark.parametrize("head", HEADS)
def test_forks_have_what_their_repositories_call(head):
    image, caption = features(I=len(LENGTHS))
    made = {}
    for name in forks.__all__:
        made[name] = getattr(forks, name)(D, S, head, num_region=R).double().eval()
        made[name].load_state_dict(MODELS[head].scorer().state_dict())
    want = MODELS[head].scorer()(image, caption, LENGTHS)
    for name in "NCR", "RCL", "CRCL", "BiCro":
        torch.testing.assert_close(made[name](image, caption, LENGTHS), want, rtol=0, atol=1e-12)
    logit = made["DECL"](image, caption, LENGTHS)
    torch.testing.assert_close(torch.sigmoid(logit), want, rtol=0, atol=1e-12)
    score, own = made["L2RM"](image, caption, LENGTHS)
    torch.testing.assert_close(score, want, rtol=0, atol=1e-12)
    assert not own.requires_grad
    torch.testing.assert_close(own, want.diagonal(), rtol=0, atol=1e-12)
    alone = made["L2RM"].forward_individual(image, caption, LENGTHS)
    torch.testing.assert_close(alone, want.diagonal()[:, None], rtol=0, atol=1e-12)
    means = torch.stack([caption[t, :n].mean(0) for t, n in enumerate(LENGTHS)])
    for found, mean in zip(made["BiCro"].glo_emb(image, caption, LENGTHS), (image.mean(1), means), strict=True):
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)
