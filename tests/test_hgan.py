"""What HGAN has and other models do not: adjacency and refusals (test_model_contract.py has the rest)."""

import pytest
import torch
from model_cases import MODELS
from sgraf_cases import LENGTHS, D, R, features

import itm_fast
from itm_fast.models.hgan import FeatureGraph, HierarchicalAlignment, Layout


def test_adjacency_multiplies_the_exponentials():
    model, (image, caption) = MODELS["HGAN"].scorer(), features()
    generator = torch.Generator().manual_seed(4)
    near_v = (torch.rand(5, R, R, generator=generator) < 0.5).double()
    near_t = (torch.rand(7, 8, 8, generator=generator) < 0.5).double()
    near_v[1, 2] = 0  # a region without neighbours keeps what it was
    near_t[3] = 0
    want = MODELS["HGAN"].looped(model, image, caption, image_adjacency=near_v, caption_adjacency=near_t)
    assert (want - MODELS["HGAN"].looped(model, image, caption)).abs().max() > 1e-3
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    for gib in (1.0, 1e-7):
        with torch.no_grad(), itm_fast.workspace(gib):
            states = model.image_state(image, None, near_v), model.caption_state(words, cu_seqlens, near_t)
            score = model.score(states[0], words, cu_seqlens, states[1])
        torch.testing.assert_close(score, want, rtol=0, atol=1e-10)
    image.requires_grad_()
    model.image_state(image, None, near_v)[1].square().sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"granularities": (1, 3)}, "granularities must divide embed_size = 16, got 1, 3"),
        ({"granularities": (0,)}, "granularities must divide"),
        ({"levels": (1, 1)}, "levels must be three weights"),
        ({"levels": (0, 0, 0)}, "levels must be three weights, not all of them 0"),
        ({"graph_layers": -1}, "graph_layers must be at least 0, got -1"),
    ],
    ids=str,
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalAlignment(D, **change)


def test_a_graph_of_few_rows_is_that_of_many():
    layer, rows = FeatureGraph(D).double(), torch.randn(4 * 6, D, dtype=torch.float64)
    assert 6 < D < len(rows)  # below D rows the products are other ones
    whole, one = (Layout(torch.full((n,), 6), 6) for n in (4, 1))
    with itm_fast.use_backend("torch"):
        found = torch.cat([layer(own, one, None) for own in rows.split(6)])
        torch.testing.assert_close(layer(rows, whole, None), found)
