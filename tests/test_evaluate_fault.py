"""Evaluation on a GPU whose thread blocks have waited in vain for each other: what it says, and that only once."""

import warnings

import pytest
import torch

from itm_fast import _cuda
from itm_fast.evaluation import score_all

from .test_evaluation_scoring import Scorer, random_encoded


def test_nan_of_blocks_that_gave_up_waiting_is_the_fault_of_the_gpu(monkeypatch):
    monkeypatch.setattr(_cuda, "_gave_up", {None: torch.ones(1, dtype=torch.int32)})
    monkeypatch.setattr(_cuda, "_without_clusters", set())
    encoded, scorer = random_encoded(7, 23), Scorer()
    with pytest.warns(UserWarning, match="waited in vain for each other, and they may do so again; .* none is NaN"):
        score_all(scorer, encoded, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_all(scorer, encoded, progress=False)  # it has been said
    monkeypatch.setattr(Scorer, "score", lambda *given: torch.full((len(given[1][0]), len(given[3]) - 1), torch.nan))
    sentence = r"image 0 and caption \d+ is NaN, as the GPU's blocks gave up waiting for each other; run the command"
    with pytest.raises(ValueError, match=sentence):
        score_all(scorer, encoded, progress=False)
    encoded.image[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="Not finite: that image's embedding"):
        score_all(scorer, encoded, progress=False)
