"""A pair's score by a whole scorer has the same bits whatever block, order or number of threads it is scored with."""

import pytest
import torch
from cpu_cases import needs_cpu
from model_cases import MODELS, Model
from torch.nn.functional import normalize

import itm_fast
from itm_fast.models._rows import apart, linear, sigmoid
from itm_fast.models.dual_encoder import MeanCosine
from itm_fast.nn import CrossAttentionScore
from itm_fast.testing import assert_accurate

pytestmark = needs_cpu
LENGTHS = [5, 4, 10, 7, 17, 4, 9, 6, 40, 12, 5, 8, 11, 3]
EVERY = range(len(LENGTHS))
R = 6


def without_weights(make):
    return Model("cross_attention_score", lambda D, S: make(), {}, lambda module: None)


SCORERS = {
    **MODELS,
    "SCAN-t2i": without_weights(CrossAttentionScore),
    "SCAN-i2t": without_weights(lambda: CrossAttentionScore("i2t", pool="mean")),
    "dual encoder": without_weights(MeanCosine),
}


class Problem:
    """Unit features, and the scores of some images with some captions in that order."""

    def __init__(self, model, D, S, dtype=torch.float32, regions=None):
        generator = torch.Generator().manual_seed(1)
        self.module = model.scorer(dtype, D, S)
        self.image = normalize(torch.randn(5, R, D, generator=generator), dim=-1).to(dtype)
        words = normalize(torch.randn(sum(LENGTHS), D, generator=generator), dim=-1).to(dtype)
        self.captions, self.regions = words.split(LENGTHS), regions

    @torch.no_grad()
    def score(self, images=range(5), captions=EVERY, threads=1):
        edge = torch.tensor([0, *(LENGTHS[t] for t in captions)]).cumsum(0)
        regions = None if self.regions is None else self.regions[list(images)]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with itm_fast.use_backend("cpu"):
                words = torch.cat([self.captions[t] for t in captions])
                return self.module(self.image[list(images)], words, edge, regions)
        finally:
            torch.set_num_threads(before)


def check(problem):
    whole = problem.score()
    assert whole.isfinite().all()
    for threads in (2, 3):
        assert torch.equal(problem.score(threads=threads), whole)
    order, turned = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(2)).tolist(), [3, 0, 4, 1, 2]
    assert torch.equal(problem.score(turned, order), whole[turned][:, order])
    for t in EVERY:
        assert torch.equal(problem.score(captions=[t]), whole[:, t : t + 1])
    for i in (0, 4):
        assert torch.equal(problem.score(images=[i]), whole[i : i + 1])
    with itm_fast.workspace(2e-5):
        assert torch.equal(problem.score(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("D,S", [(32, 8), (80, 24)])
@pytest.mark.parametrize("name", SCORERS)
def test_any_block_order_and_number_of_threads(name, D, S):
    check(Problem(SCORERS[name], D, S))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
def test_images_of_fewer_regions(name):
    check(Problem(SCORERS[name], 32, 8, regions=torch.tensor([6, 1, 3, 6, 5])))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["SGR", "SAF", "SHAN-full", "TSHSR", "HGAN"])
def test_other_dtypes(name, dtype):
    check(Problem(SCORERS[name], 32, 8, dtype))


@pytest.mark.parametrize("name", ["SGR", "SAF"])
def test_published_sizes(name):
    problem = Problem(SCORERS[name], 1024, 256)
    whole = problem.score(threads=2)
    assert torch.equal(problem.score(captions=[4, 9]), whole[:, [4, 9]])
    assert torch.equal(problem.score(images=[2], captions=[0]), whole[2:3, :1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N,K,S", [(1, 1, 1), (97, 33, 65), (200, 700, 16), (0, 4, 4), (3, 4, 0)])
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(N, K, S, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=generator).to(dtype) for n in ((N, K), (S, K), (S,)))
    for added in (bias, None):
        with itm_fast.use_backend("cpu"):
            whole, strided = linear(x, weight, added), linear(x.t().contiguous().t(), weight, added)
            parts = [linear(part, weight, added) for part in x.split([1, 5, 12, N - 18])] if N > 18 else [whole]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(strided, whole)

        def product(kind, added=added):
            return [torch.nn.functional.linear(x.to(kind), weight.to(kind), None if added is None else added.to(kind))]

        assert_accurate([whole], product, dtype)


@pytest.mark.parametrize("x,weight,bias", [((2, 8), (3, 4), None), ((2, 8), (3, 8), (1,)), ((8,), (3,), None)])
def test_sizes_that_do_not_fit_are_refused(x, weight, bias):
    with pytest.raises(ValueError, match="features of size 8 cannot be multiplied by weights"):
        linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_image_and_words_of_other_sizes_are_refused():
    scorer, image, words, edge = MeanCosine(), torch.ones(2, 3, 16), torch.ones(4, 8), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"cap_emb must be \[N, D\] with D = 16 as in img_emb, got \[4, 8\]"):
        scorer(image, words, edge)
    states = scorer.image_state(image), scorer.caption_state(words, edge)
    with torch.no_grad(), pytest.raises(ValueError, match="features of size 16"):
        scorer.score(states[0], words, edge, states[1])


@pytest.mark.parametrize("trained", range(3), ids=["rows", "weight", "bias"])
def test_any_argument_alone_gets_its_gradient(trained):
    tensors = [torch.randn(shape) for shape in ((4, 6), (3, 6), (3,))]
    tensors[trained].requires_grad_()
    linear(*tensors).sum().backward()
    assert tensors[trained].grad is not None


def test_torchs_transforms_do_not_come_to_the_kernel():
    def noted(x):
        found.append(apart(x))
        return x

    found, x = [], torch.randn(4, 6)
    torch.func.jvp(noted, (x,), (x,))
    torch.func.vmap(noted)(x)
    noted(x)
    assert found == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_sigmoid_is_rounded_once(dtype):
    x = torch.linspace(-14, 14, 1001).to(dtype)
    found, exact = sigmoid(x), x.double().sigmoid()
    spacing = exact * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= (2 if dtype.itemsize > 2 else 1) * spacing).all()
