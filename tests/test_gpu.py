"""What only a GPU shows: offsets beyond 2^31, CUDA graphs, streams, devices, compiled graphs, memory, that nothing is
compiled again; and the models against the published vectors."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sgraf_cases import HEADS, golden, under
from triton_cases import gpu, needs_triton, unless

import itm_fast
from itm_fast import _backends
from itm_fast.evaluation.ranking import ranks
from itm_fast.models import sgraf
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.nn import CrossAttentionScore
from itm_fast.ops import _examples as examples
from itm_fast.ops import _first_use
from itm_fast.testing import inputs, op_checks
from itm_fast.testing.scan import loop as scan_loop
from itm_fast.testing.sgraf import loop as sgraf_loop

pytestmark = [gpu, unless("torch", "cuda")]
OPS = [op for op in sorted(_backends.OFFERS) if "triton" in _backends.OFFERS[op]]
over_ops = pytest.mark.parametrize("op", [pytest.param(op, marks=needs_triton) for op in OPS])
over_kernels = pytest.mark.parametrize(
    "op, backend",
    [
        pytest.param(op, backend, marks=unless(backend, "cuda"), id=f"{op}-{backend}")
        for op, offered in sorted(_backends.OFFERS.items())
        for backend in _backends.ON_GPU
        if backend in offered
    ],
)
over_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=unless(name, "cuda"), id=name) for name in _backends.ON_GPU]
)
# Of the examples: what the kernels of a backend all take.
SIZES = {"triton": examples.SMALL, "cuda": examples.Size(3, (5, 2), 7, 64, 64, 3)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GPU = torch.device("cuda", 0)
GIB = 1 << 30


def arguments(op, dtype=torch.float32, size=examples.SMALL, device="cuda"):
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in examples.example(op, size)]
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in moved]


def call(op, args, backend="triton"):
    return op_checks.first(getattr(itm_fast, op)(*args, backend=backend))


def needs(backend, dtype):
    if reason := itm_fast.why_not(backend, GPU, dtype):
        pytest.skip(f"{backend}: {reason}")


def needs_memory(gib):
    free = torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else 0
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that are compiled from now on."""
    import triton

    seen = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: seen.append(str(kwargs.get("repr")))
    )
    return seen


@over_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_of_first_use_passes(op, backend, dtype):
    needs(backend, dtype)
    for precision in ("highest", "high"):
        try:
            torch.set_float32_matmul_precision(precision)
            for way in examples.ways(op):
                assert examples.problem(op, backend, GPU, dtype, True, **way) is None
        finally:
            torch.set_float32_matmul_precision("highest")
    assert _first_use.put_aside(op, backend, GPU, dtype) is None
    kernels = (name for name in _backends.OFFERS[op] if name in _backends.ON_GPU)
    assert _backends.resolve(op, None, GPU, dtype) == next(k for k in kernels if not itm_fast.why_not(k, GPU, dtype))


@over_ops
def test_other_lengths_counts_and_blocks_compile_nothing(op, compiled):
    def run(images, lengths, gib):
        args = arguments(op, size=examples.Size(images, lengths, 36, 64, 32, 3))
        leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with itm_fast.workspace(gib):
            result = call(op, leaves)
            result.backward(op_checks.upstream(result))

    run(5, (13, 1, 4, 4, 7, 20), 1.0)
    run(4, (12, 2, 16), 0.01)
    before = len(compiled)
    for images, lengths, gib in ((1, (9,), 1.0), (17, (3, 30, 1, 8, 16), 0.004), (32, (16,) * 16, 1.0)):
        run(images, lengths, gib)
    assert compiled[before:] == []


@over_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_replays_the_forward_pass(op, backend, dtype):
    needs(backend, dtype)
    args = arguments(op, dtype, SIZES[backend])
    with torch.no_grad():
        want = call(op, args, backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(op, args, backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(op, args, backend)
        first = next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
        graph.replay()
        assert torch.equal(found, want)
        first.mul_(0.5)
        graph.replay()
        assert torch.equal(found, call(op, args, backend))


@over_ops
def test_inductor_compiles_one_graph(op):
    torch.compiler.reset()
    args = arguments(op)
    places = [k for k, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()][:2]

    def run(*leaves):
        whole = list(args)
        for k, leaf in zip(places, leaves):
            whole[k] = leaf * 1.0
        return call(op, whole, None)

    outcomes = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaves = [args[k].clone().requires_grad_() for k in places]
        result = function(*leaves)
        result.backward(op_checks.upstream(result))
        outcomes.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b)


@over_kernels
def test_two_streams_do_not_disturb_each_other(op, backend):
    args = arguments(op, size=SIZES[backend])
    sets = [args, [a * 0.5 if k == 0 else a for k, a in enumerate(args)]]
    with torch.no_grad():
        want = [call(op, args, backend) for args in sets]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in sets], [[], []]
        for _ in range(10):
            for stream, args, into in zip(streams, sets, found):
                with torch.cuda.stream(stream):
                    into.append(call(op, args, backend))
        torch.cuda.synchronize()
    for expected, results in zip(want, found):
        assert all(torch.equal(r, expected) for r in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@over_kernels
def test_a_device_that_is_not_the_current_one(op, backend):
    size = SIZES[backend]
    want = call(op, arguments(op, size=size), backend).cpu()
    args = arguments(op, size=size, device="cuda:1")
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    found = call(op, leaves, backend)
    found.backward(op_checks.upstream(found))
    assert found.device == torch.device("cuda", 1)
    torch.testing.assert_close(found.detach().cpu(), want.detach())


def unit(*shape, dtype=torch.float16):
    x = torch.empty(*shape, dtype=dtype, device="cuda")
    for part in x.split(max(1, (1 << 28) // max(1, x[0].numel()))):
        part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, device="cuda"), dim=-1))
    return x


@over_backends
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_more_than_2_to_the_31_numbers_of_regions(direction, backend):
    needs_memory(30)
    image, words = unit(60_000, 36, 1024), unit(20, 1024)  # 2.2e9
    assert image.numel() > 1 << 31
    bounds = torch.tensor([0, 13, 20], device="cuda")
    options = dict(direction=direction, backend=backend)
    score = itm_fast.cross_attention_score(image, words, bounds, **options)
    assert torch.equal(score[-3:], itm_fast.cross_attention_score(image[-3:], words, bounds, **options))
    image.requires_grad_()
    itm_fast.cross_attention_score(image, words, bounds, **options)[-1].sum().backward()
    last = image.detach()[-1:].clone().requires_grad_()
    itm_fast.cross_attention_score(last, words, bounds, **options).sum().backward()
    torch.testing.assert_close(image.grad[-1:], last.grad)
    assert not image.grad[:-1].any()


@over_backends
def test_more_than_2_to_the_31_numbers_of_words(backend):
    needs_memory(30)
    words, image = unit(2_200_000, 1024), unit(2, 36, 1024)
    bounds = torch.arange(0, 2_200_001, 10, device="cuda")
    score = itm_fast.cross_attention_score(image, words, bounds, backend=backend)
    alone = itm_fast.cross_attention_score(image, words[-20:], bounds[:3], backend=backend)
    assert torch.equal(score[:, -2:], alone)


@needs_triton
@pytest.mark.parametrize("op", [op for op in ("similarity_graph", "similarity_filter") if op in OPS])
def test_more_than_2_to_the_31_numbers_of_nodes(op):
    needs_memory(30)
    nodes, S = unit(700, 12_000, 256), 256
    assert nodes.numel() > 1 << 31
    bounds = torch.arange(0, 12_001, 12, device="cuda")
    rest = arguments(op, torch.float16, examples.PUBLISHED)[2:]
    assert rest[0].shape[-1] == S
    found = op_checks.first(getattr(itm_fast, op)(nodes, bounds, *rest, backend="triton"))
    alone = getattr(itm_fast, op)(nodes[-1:, -24:].contiguous(), bounds[:3], *rest, backend="triton")
    assert torch.equal(found[-1:, -2:], op_checks.first(alone))


@needs_triton
def test_more_than_2_to_the_31_similarities():
    needs_memory(40)
    image, words = unit(700, 36, 64), unit(12_500, 64)
    bounds = torch.arange(0, 12_501, 10, device="cuda")
    weight, bias = torch.randn(256, 64, device="cuda").half(), torch.randn(256, device="cuda").half()
    found = itm_fast.cross_attention_similarity(image, words, bounds, weight, bias, backend="triton")
    assert found.numel() > 1 << 31
    tail = words[-20:].contiguous(), bounds[:3], weight, bias
    assert torch.equal(found[-1:, -20:], itm_fast.cross_attention_similarity(image[-1:], *tail, backend="triton"))


def scorer_of(head, D=1024, S=256, dtype=torch.float32):
    torch.manual_seed(0)
    return EncoderSimilarity(D, S, head).cuda().to(dtype)


def peak(function):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@needs_triton
@pytest.mark.parametrize("gib", [0.25, 1.0])
@pytest.mark.parametrize("model", ["scan", *HEADS])
@torch.no_grad()
def test_scoring_keeps_to_its_workspace(model, gib):
    image, words, bounds = (x.cuda() for x in inputs(500, [12] * 4000, 36, 256))
    scorer = CrossAttentionScore() if model == "scan" else scorer_of(model, 256, 64).eval()
    states = scorer.image_state(image), words, bounds, scorer.caption_state(words, bounds)
    with itm_fast.use_backend("triton"), itm_fast.workspace(gib):
        scorer.score((image[:4], *(s[:4] for s in states[0][1:])), *states[1:])
        score, used = peak(lambda: scorer.score(*states))
    assert used - score.nbytes < gib * GIB + (64 << 20)  # tables of rows and captions beside


@needs_triton
@pytest.mark.parametrize("head", HEADS)
def test_training_takes_less_than_a_tenth_of_the_loops_memory(head):
    needs_memory(40)
    scorer = scorer_of(head).train()
    image, words, bounds = (x.cuda() for x in inputs(128, [12] * 128, 36, 1024))
    leaves = [image.requires_grad_(), words.requires_grad_(), *scorer.parameters()]

    def step(score):
        loss = itm_fast.hardest_negative_loss(score)
        return torch.autograd.grad(loss, leaves)

    caption = itm_fast.unpack(words, bounds)
    state = scorer.state_dict(keep_vars=True)
    step(scorer(image, words, bounds))
    _, used = peak(lambda: step(scorer(image, words, bounds)))
    _, loops = peak(lambda: step(sgraf_loop(state, image, caption, [12] * 128, training=True)))
    assert used < loops / 10, f"{used / GIB:.2f} GiB, the loop {loops / GIB:.2f}"


@needs_triton
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_1024_trains_in_40_gib(head):
    needs_memory(45)
    scorer = scorer_of(head).train()
    image, words, bounds = (x.cuda() for x in inputs(1024, [12] * 1024, 36, 1024))
    leaves = [image.requires_grad_(), words.requires_grad_(), *scorer.parameters()]

    def step():
        return torch.autograd.grad(itm_fast.hardest_negative_loss(scorer(image, words, bounds)), leaves)

    found, used = peak(step)
    assert used < 40 * GIB
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_sgraf_has_the_published_vectors(head, mode):
    want = {k: v.cuda() for k, v in golden(head, mode).items()}
    lengths = want["lengths"].tolist()
    image, caption = (want[k].float().requires_grad_() for k in ("image", "caption"))
    model = sgraf.EncoderSimilarity(64, 32, head, 3, num_region=image.shape[1]).cuda()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in under(want, "param/").items()})
    model.train(mode == "train")
    for child in model.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
    score = model(image, caption, lengths)
    score.backward(want["d_score"].float())
    torch.testing.assert_close(score.double(), want["score"], rtol=0, atol=2e-5)
    for found, key in ((image.grad, "d_image"), (caption.grad, "d_caption")):
        largest = want[key].abs().max().item()
        torch.testing.assert_close(found.double(), want[key], rtol=0, atol=1e-3 * largest)
    gradients = under(want, "grad/")
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=0, atol=1e-3 * largest, msg=name)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_equals_its_loop(direction, dtype):
    image, words, bounds = inputs(20, [12, 3, 30, 1, 7], 36, 1024, dtype=torch.float64)
    image, words = image.to(dtype), words.to(dtype)
    exact = scan_loop(image.double(), itm_fast.unpack(words, bounds).double(), bounds.diff(), direction=direction)
    found = CrossAttentionScore(direction)(image.cuda(), words.cuda(), bounds.cuda()).cpu().double()
    assert (found - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5


@torch.no_grad()
def test_ranks_of_scores_on_the_device():
    score = torch.randn(50, 250, device="cuda").bfloat16()  # with ties
    found, want = (ranks(x, np.arange(250) // 5) for x in (score, score.cpu()))
    assert all(np.array_equal(a, b) for a, b in zip(found, want))


@torch.no_grad()
def test_the_evaluation_of_a_whole_split_is_the_same_as_on_the_cpu():
    from itm_fast.evaluation import Encoded, score_all

    image, words, bounds = inputs(70, [1 + (7 * t) % 23 for t in range(200)], 36, 64)
    scorer = scorer_of("SGR", 64, 32).eval()
    owner = np.arange(200) % 70
    there = score_all(scorer, Encoded(image, None, words, bounds, owner, torch.device("cuda")), progress=False)
    with itm_fast.use_backend("reference"):
        here = Encoded(image, None, words, bounds, owner)
        want = score_all(copy.deepcopy(scorer).cpu(), here, progress=False)
    np.testing.assert_allclose(there, want, rtol=0, atol=1e-5)


def test_the_doctor_finds_nothing_wrong():
    command = [sys.executable, "-m", "itm_fast", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert [check for check in report["checks"] if not check["ok"]] == []
    for name in _backends.ON_GPU:
        assert report["backends"]["cuda:0"][name] == itm_fast.why_not(name, GPU)
