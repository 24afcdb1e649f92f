"""What follows from an op's declaration: its schema, its gradients, its pairs, and what its docstring says."""

import ast
import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import itm_fast
from itm_fast import evaluation, ops
from itm_fast._names import BACKENDS, Backend, Ties
from itm_fast.evaluation import TIES
from itm_fast.ops import _examples as examples
from itm_fast.ops._declare import DECLARED, Choice, Floats, Integers, Result

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(itm_fast.__file__).parent
over_ops = pytest.mark.parametrize("op", sorted(ops.__all__))

SIMILARITY = (
    "Tensor image, Tensor image_global, Tensor words, Tensor caption_global, Tensor local_weight, Tensor local_bias, "
    "Tensor global_weight, Tensor global_bias, "
)
GRAPH = (
    "Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias, Tensor value_weight, "
    "Tensor value_bias, "
)
REST = "Tensor cu_seqlens, Tensor? region_lengths, "
# op -> its arguments in torch's schema language, its results, how many arguments have a gradient, and `pairs`
KNOWN = {
    "attended_vectors": (
        f"Tensor image, Tensor words, Tensor queries, Tensor values, Tensor scale, {REST}str direction, "
        "str affinity_norm",
        "Tensor",
        5,
        None,
    ),
    "cross_attention_score": (
        f"Tensor image, Tensor words, {REST}str direction, str affinity_norm, float scale, str pool, float pool_scale, "
        "str weights, float threshold, str similarity",
        "Tensor",
        2,
        "INEI........",
    ),
    "cross_attention_similarity": (
        f"Tensor image, Tensor words, Tensor weight, Tensor bias, {REST}str direction, str affinity_norm, float scale",
        "Tensor",
        4,
        None,
    ),
    "global_local_score": ("Tensor vector, Tensor words, Tensor cu_seqlens, float scale", "Tensor", 2, "INE."),
    "hardest_negative_loss": (
        "Tensor score, Tensor? positive, Tensor? image_ids, float margin, bool hardest, bool both",
        "Tensor",
        1,
        None,
    ),
    "hierarchical_alignment_score": (
        "Tensor image, Tensor image_key, Tensor image_gate, Tensor words, Tensor word_key, Tensor word_gate, "
        f"Tensor image_pool, Tensor caption_pool, {REST}str direction, float scale, str pool, float local_mix, "
        "float global_mix",
        "Tensor",
        8,
        "IIINNN..EI.....",
    ),
    "similarity_context": (
        "Tensor overall, Tensor local, Tensor assignment, Tensor cu_seqlens, int[] sizes",
        "Tensor",
        3,
        None,
    ),
    "similarity_filter": (
        "Tensor nodes, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, Tensor running_mean, "
        "Tensor running_var, Tensor cu_seqlens, bool training, float eps",
        "(Tensor, Tensor, Tensor)",
        5,
        None,
    ),
    "similarity_filter_score": (
        f"{SIMILARITY}Tensor filter_weight, Tensor filter_bias, Tensor norm_weight, Tensor norm_bias, "
        f"Tensor score_weight, Tensor score_bias, Tensor running_mean, Tensor running_var, {REST}float scale, "
        "float eps, str output",
        "Tensor",
        14,
        "IINT............EI...",
    ),
    "similarity_graph": (f"Tensor nodes, {GRAPH}Tensor cu_seqlens", "Tensor", 7, None),
    "similarity_graph_score": (
        f"{SIMILARITY}{GRAPH}Tensor score_weight, Tensor score_bias, {REST}float scale, str output",
        "Tensor",
        16,
        "IINT............EI..",
    ),
    "similarity_nodes": (f"{SIMILARITY}{REST}float scale", "(Tensor, Tensor)", 8, None),
}


def test_every_op_is_declared():
    assert set(KNOWN) == set(ops.__all__) == set(DECLARED)


@over_ops
def test_the_schemas_are_those_that_saved_graphs_hold(op):
    arguments, results, _, _ = KNOWN[op]
    kept = ", Tensor[] results" if op == "similarity_nodes" else ""
    for name, schema in (
        (op, f"({arguments}, str backend) -> {results}"),
        (f"{op}_backward", f"(Tensor grad, bool[] needs, {arguments}{kept}, str backend) -> Tensor[]"),
    ):
        assert str(getattr(torch.ops.itm_fast, name).default._schema) == f"itm_fast::{name}{schema}"


@over_ops
def test_gradients_and_pairs_follow_from_the_arguments(op):
    assert (DECLARED[op].differentiable, DECLARED[op].pairs) == KNOWN[op][2:]


@over_ops
def test_the_public_function_takes_the_declared_arguments(op):
    names = DECLARED[op].names
    assert sorted(inspect.signature(getattr(itm_fast, op)).parameters) == sorted([*names, "backend"])
    reference = list(inspect.signature(DECLARED[op].reference).parameters)
    assert reference == names or (DECLARED[op].stem != op and reference == ["args"])


def test_shapes_of_results_add_and_multiply():
    size = {"I": 2, "N": 7, "T": 3, "C": 4}
    assert list(Result("nodes", "I N+T+T*C N").sizes(size, {})) == [2, 22, 7]
    assert list(Result("loss", "").sizes(size, {})) == []
    assert Result("mean", lambda size, given: (size["T"] + given["more"],)).sizes(size, {"more": 1}) == (4,)


def implementations():
    ops = PACKAGE / "ops"
    places = (ops / "_torch", "*.py"), (ops / "_cuda", "*.py"), (ops, "_c*.py"), (ROOT / "kernels", "*.py")
    return [path for folder, names in places for path in folder.glob(names)]


@pytest.mark.parametrize("path", implementations(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_implementation_imports_an_op(path):
    depth = 1 if path.parent.name == "ops" else 2  # of the package of the ops
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            assert not {node.module, *(a.name for a in node.names)} & set(ops.__all__), ast.unparse(node)


def documented(op):
    """What the docstring says of each argument, and of each error."""
    text = inspect.getdoc(getattr(itm_fast, op))
    found = {}
    for section in ("Args", "Raises"):
        lines = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", text + "\n", re.M)[1]
        for name, line in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", lines, re.M):
            found[name] = " ".join(line.split())
    return found


@over_ops
def test_the_docstring_gives_the_declared_shapes_and_choices(op):
    said = documented(op)
    for argument in DECLARED[op].arguments:
        line = said.pop(argument.name)
        if isinstance(argument, Floats | Integers):
            assert line.replace("T + 1", "T+1").startswith(str(argument.shape)), line
        if isinstance(argument, Integers) and argument.name != "cu_seqlens":
            assert "int32 or int64" in line
        if isinstance(argument, Choice):
            assert all(re.search(rf"\b{choice}\b", line) for choice in argument.choices), line
    assert tuple(re.findall(r'"(\w+)"', said["backend"])) == DECLARED[op].offered
    assert set(said) == {"backend", "ValueError", "TypeError", "NotImplementedError"}


@over_ops
def test_the_types_of_options_name_their_choices(op):
    types = get_type_hints(getattr(itm_fast, op))
    for argument in DECLARED[op].arguments:
        if isinstance(argument, Choice):
            assert get_args(types[argument.name]) == argument.choices
    assert types["backend"] == Backend | None


def test_the_types_of_rules_and_backends_name_them_all():
    assert get_args(Ties) == TIES
    assert get_args(Backend) == ("auto", *BACKENDS) == ("auto", *itm_fast._backends.NAMES)
    for name in ("evaluate", "metrics", "fold_metrics", "ranks", "rate", "compare", "relevance_metrics"):
        assert inspect.signature(getattr(evaluation, name)).parameters["ties"].annotation == "Ties"


def test_an_argument_has_one_line_in_all_docstrings():
    said = {}
    for op in ops.__all__:
        lines = documented(op)
        packed = next((name for name in ("words", "nodes", "local") if name in lines), None)  # what has bounds
        for argument in DECLARED[op].arguments:
            alike = repr(argument), packed if argument.name == "cu_seqlens" else None
            said.setdefault(alike, set()).add(lines[argument.name])
        said.setdefault(DECLARED[op].offered, set()).add(lines["backend"])
        for name in ("TypeError", "NotImplementedError"):
            said.setdefault(name, set()).add(lines[name])
    assert not {alike: lines for alike, lines in said.items() if len(lines) > 1}


@pytest.mark.parametrize("op,backend", [(op, backend) for op in sorted(DECLARED) for backend in DECLARED[op].keeping])
def test_a_trace_has_the_op_and_its_gradient(op, backend, small_calls):
    """What an op keeps for its backward pass is values, of which a trace by make_fx has none."""
    given = (x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in examples.example(op))
    first, *rest = given
    leaf = first.requires_grad_()

    def score(x):
        return getattr(itm_fast, op)(x, *rest, backend=backend)

    traced = make_fx(score)(leaf)
    assert f"itm_fast.{op}.default" in {str(node.target) for node in traced.graph.nodes}
    (found,), (want,) = (torch.autograd.grad(run(leaf).sum(), leaf) for run in (traced, score))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12 * want.abs().max().item())  # sums of some 1,000 terms


def test_a_call_passes_by_the_dispatcher_where_no_gradient_is_recorded_and_nothing_watches(monkeypatch):
    """Torch's dispatcher takes longer than the scores of a few pairs."""
    op, dispatched = DECLARED["cross_attention_score"], []
    call = op.call
    monkeypatch.setattr(op, "call", lambda *args: dispatched.append(args) or call(*args))
    image, words, cu_seqlens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0, 2, 5])

    def score(x):
        return itm_fast.cross_attention_score(x, words, cu_seqlens, backend="reference")

    plain = score(image)
    with torch.no_grad():
        assert score(image.clone().requires_grad_()).equal(plain)
    assert not dispatched
    assert score(image.clone().requires_grad_()).requires_grad
    assert len(dispatched) == 1
    traced = make_fx(score)(image)
    assert "itm_fast.cross_attention_score.default" in {str(node.target) for node in traced.graph.nodes}
    assert len(dispatched) == 2
    with torch.profiler.profile() as profile:
        score(image)
    assert "itm_fast::cross_attention_score" in {event.name for event in profile.events()}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of the sizes
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_trace_of_torch_jit_and_a_negated_view_have_the_ops_values(backend):
    image, words, cu_seqlens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0, 2, 5])

    def score(*args):
        return itm_fast.cross_attention_score(*args, backend=backend)

    traced = torch.jit.trace(score, (image, words, cu_seqlens))
    others = torch.randn(3, 3, 8), torch.randn(6, 8), torch.tensor([0, 4, 5, 6])
    assert traced(*others).equal(score(*others))
    assert score(torch._neg_view(image), words, cu_seqlens).equal(score(-image, words, cu_seqlens))
