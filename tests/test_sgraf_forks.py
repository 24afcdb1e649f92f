"""What repositories that copy SGRAF's scorer change in it: logits for the loss, scores of matching pairs alone."""

import pytest
import torch
from model_cases import MODELS
from sgraf_cases import HEADS, LENGTHS, dropout, features


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
