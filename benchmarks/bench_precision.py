"""How each precision changes the ranking, for the package's trained models on their held-out pictures.

    python benchmarks/bench_precision.py --threads 2 --write cpu

Scores in float64 are the reference. On a CUDA device the kernels run in each precision. Without one it is emulated: the
factors of every matrix product are cut to what the tensor cores read (TF32: 10 bits of mantissa, the rest cut off, as
they do with float32 values), everything else stays in float32, as in the kernels. Half-precision features make
half-precision scores, which tie often; a tie counts against the query, so those rows are given twice, with the scores
rounded and with the same scores before that rounding.

Equal pictures and captions of equal words are used once: they tie in any precision. `--write NAME` saves
benchmarks/results/precision_NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, machine
from itm_fast.data import Vocabulary, open_split
from itm_fast.data.captions import encode_caption
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER, VOCABULARY
from itm_fast.evaluation import encode, metrics
from itm_fast.ops._declare import DECLARED

MODELS = {"SGR": ("sgr",), "SAF": ("saf",), "SGRAF": ("sgr", "saf"), "SCAN t2i": ("scan",)}
QUERIES = 100  # of each direction, for Kendall's tau, which takes all pairs of a query's items


class Precision(NamedTuple):
    """A row: the dtype of features, weights and scores, what factors of products are cut to, scores rounded or not."""

    name: str
    features: torch.dtype = torch.float32
    products: str = "float32"
    rounded: bool = True


PRECISIONS = (
    Precision("float32"),
    Precision("TF32 products", products="tf32"),
    Precision("bfloat16 products of float32", products="bfloat16"),
    Precision("float16", torch.float16, "float16"),
    Precision("float16, scores not rounded", torch.float16, "float16", rounded=False),
    Precision("bfloat16", torch.bfloat16, "bfloat16"),
    Precision("bfloat16, scores not rounded", torch.bfloat16, "bfloat16", rounded=False),
)
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mkldnn_convolution")


def cut(x: Tensor, products: str) -> Tensor:
    """Cut float32 values to the bits that tensor cores read."""
    if products == "tf32":
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(getattr(torch, products)).float()


class Emulated(TorchDispatchMode):
    """Cut both factors of every matrix product; ops of this package run as their portable form, seen product by
    product."""

    def __init__(self, products: str) -> None:
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")
        if name[0] == "itm_fast":
            with self:
                return DECLARED[name[1]].implementation("torch").forward(*args[:-1])
        if name[1] in _PRODUCTS and args[-1] is not None:
            first = 1 if name[1] in ("addmm", "baddbmm") else 0  # the summand comes first
            factors = [cut(x, self.products) for x in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def rounded(scorer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of the scorer with weights and statistics in `dtype`."""
    return copy.deepcopy(scorer).to(dtype)


@torch.no_grad()
def emulated(scorer: Any, image: Tensor, words: Tensor, cu_seqlens: Tensor, one: Precision) -> Tensor:
    """Scores of one precision on the CPU, in float32 and not rounded."""
    states = scorer.image_state(image)[1:], scorer.caption_state(words, cu_seqlens)
    image, words, *rest = (x.to(one.features).float() for x in (image, words, *states[0], *states[1]))
    head = rounded(rounded(scorer, one.features), torch.float32)
    given = (image, *rest[: len(states[0])]), words, cu_seqlens, tuple(rest[len(states[0]) :])
    if one.products == "float32":
        return head.score(*given)
    with itm_fast.use_backend("torch"), Emulated(one.products):
        return head.score(*given)


@torch.no_grad()
def computed(scorer: Any, image: Tensor, words: Tensor, cu_seqlens: Tensor, one: Precision) -> Tensor | None:
    """Scores of one precision by the kernels of a CUDA device; None where they have no such mode."""
    if not one.rounded or one.name.startswith("bfloat16 products"):
        return None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if one.products == "tf32" else "highest")
    try:
        states = scorer.image_state(image)[1:], scorer.caption_state(words, cu_seqlens)
        image, words = image.to(one.features), words.to(one.features)
        image_state, caption_state = ([x.to(one.features) for x in state] for state in states)
        head = rounded(scorer, one.features)
        return head.score((image, *image_state), words, cu_seqlens, tuple(caption_state)).float()
    finally:
        torch.set_float32_matmul_precision(before)


def kendall(exact: Tensor, other: Tensor) -> Tensor:
    """Kendall's tau-b of each row of two matrices [n, items]: 1 is the same order, and ties lower it."""
    found = []
    for a, b in zip(exact, other):
        x, y = ((v[:, None] - v).sign() for v in (a, b))
        found.append((x * y).sum() / (x.abs().sum() * y.abs().sum()).sqrt())
    return torch.stack(found)


def compared(name: str, score: Tensor, exact: Tensor, caption_to_image: np.ndarray) -> dict:
    """One row: how far scores and ranking are from float64's."""
    judge, mine = (metrics(x.numpy(), caption_to_image) for x in (exact, score))
    taus = []
    for a, b in ((exact, score.double()), (exact.t(), score.double().t())):
        picked = torch.linspace(0, len(a) - 1, min(QUERIES, len(a))).long()
        taus.append(kendall(a[picked], b[picked]))
    return {
        "name": name,
        "largest_difference": harness.largest_difference(score, exact),
        "mean_difference": (score.double() - exact).abs().mean().item(),
        "i2t_r1": mine.i2t.r1,
        "t2i_r1": mine.t2i.r1,
        "i2t_r1_change": mine.i2t.r1 - judge.i2t.r1,
        "t2i_r1_change": mine.t2i.r1 - judge.t2i.r1,
        "rsum_change": mine.rsum - judge.rsum,
        "i2t_kendall_tau": taus[0].mean().item(),
        "t2i_kendall_tau": taus[1].mean().item(),
        "least_kendall_tau": min(t.min().item() for t in taus),
        "i2t_first_changed": (score.argmax(1) != exact.argmax(1)).double().mean().item(),
        "t2i_first_changed": (score.argmax(0) != exact.argmax(0)).double().mean().item(),
    }


def load(name: str, device: str) -> Any:
    """One of the package's models, in evaluation mode."""
    return itm_fast.models.load(CHECKPOINTS[name], device).model


def scores_of(name: str, split: Any, vocabulary: Any, device: str) -> dict[str, Tensor]:
    """A model's scores by precision on the CPU, "exact" among them."""
    model = load(name, device)
    encoded = encode(model, split, vocabulary, progress=False)
    image, words, cu_seqlens = (x.to(device) for x in (encoded.image, encoded.words, encoded.cu_seqlens))
    run: Callable[..., Tensor | None] = computed if device == "cuda" else emulated
    with torch.no_grad():
        exact = rounded(model.scorer, torch.float64)(image.double(), words.double(), cu_seqlens).cpu()
    found = {"exact": exact}
    made: dict[tuple, Tensor | None] = {}
    for one in PRECISIONS:
        harness.progress(f"{name}: {one.name}")
        key = one.features, one.products, device == "cuda" and one.rounded
        if key not in made:
            made[key] = run(model.scorer, image, words, cu_seqlens, one)
        score = made[key]
        if score is not None:
            found[one.name] = (score.to(one.features).float() if one.rounded else score).cpu()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="only the first pictures (default: all)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--write", metavar="NAME", help="save benchmarks/results/precision_NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(device, args.images)
    for one in result["results"]:
        show(one)
    if args.write:
        print(harness.write(f"precision_{args.write}", result))


def measure(device: str, images: int | None) -> dict:
    """All models in all precisions."""
    split, vocabulary = open_split(FOLDER, "test"), Vocabulary.load(VOCABULARY)
    if images is not None:
        split = split.first(int((split.caption_to_image < images).sum()))
    scores = {name: scores_of(name, split, vocabulary, device) for name in CHECKPOINTS}
    texts = [str(encode_caption(caption, vocabulary)) for caption in split.captions]
    _, captions = np.unique(texts, return_index=True)
    features = split.features[:].reshape(len(split.features), -1)
    _, images, places = np.unique(features, axis=0, return_index=True, return_inverse=True)
    owner = places.reshape(-1)[split.caption_to_image[captions]]
    results = []
    for title, names in MODELS.items():
        mean = {
            key: sum(scores[n][key].double() for n in names)[images][:, captions] / len(names)
            for key in scores[names[0]]
        }
        exact = mean.pop("exact")
        rows = [compared(key, score.float(), exact, owner) for key, score in mean.items()]
        judge = metrics(exact.numpy(), owner)
        results.append({"model": title, "i2t_r1": judge.i2t.r1, "t2i_r1": judge.t2i.r1, "rows": rows})
    return {
        "environment": machine.environment(),
        "emulated": device == "cpu",
        "images": len(images),
        "captions": len(captions),
        "kendall_queries": QUERIES,
        "results": results,
    }


def table(result: dict) -> str:
    """What each precision does to the ranking, and how it was found, in Markdown."""
    lines = [
        "| model | precision | largest difference | i2t R@1 | t2i R@1 | rsum | Kendall tau i2t | t2i | first changed |",
        f"|---|---|{'---:|' * 7}",
    ]
    for one in result["results"]:
        lines.append(f"| {one['model']} | float64 |  | {one['i2t_r1']:.2f} | {one['t2i_r1']:.2f} |  |  |  |  |")
        for r in one["rows"]:
            changes = " | ".join(f"{r[key]:+.2f}" for key in ("i2t_r1_change", "t2i_r1_change", "rsum_change"))
            taus = f"{r['i2t_kendall_tau']:.4f} | {r['t2i_kendall_tau']:.4f}"
            first = max(r["i2t_first_changed"], r["t2i_first_changed"])
            name = f"{one['model']} | {r['name']} | {r['largest_difference']:.0e}"
            lines.append(f"| {name} | {changes} | {taus} | {first:.1%} |")
    e, queries = result["environment"], result["kendall_queries"]
    how = "emulated on the CPU" if result["emulated"] else f"on {e['device']}"
    return (
        f"The package's models on {result['images']} held-out pictures x {result['captions']} captions, {how}; torch "
        f"{e['torch']}; {e['date']}; commit {e['commit']}. Changes against float64; tau over {queries} "
        "queries of each direction; first changed: queries whose first item is another, the worse direction.\n\n"
        + "\n".join(lines)
    )


def show(one: dict) -> None:
    """Print one model's rows."""
    heads = ("max diff", "i2t R@1", "t2i R@1", "rsum", "tau i2t", "tau t2i", "first changed")
    print(f"\n{one['model']}: R@1 in float64 {one['i2t_r1']:.2f} i2t, {one['t2i_r1']:.2f} t2i")
    print(f"  {'':30}" + "".join(f"{h:>14}" for h in heads))
    for r in one["rows"]:
        changed = max(r["i2t_first_changed"], r["t2i_first_changed"])
        cells = (
            f"{r['largest_difference']:.1e}", f"{r['i2t_r1_change']:+.2f}", f"{r['t2i_r1_change']:+.2f}",
            f"{r['rsum_change']:+.2f}", f"{r['i2t_kendall_tau']:.5f}", f"{r['t2i_kendall_tau']:.5f}", f"{changed:.2%}",
        )  # fmt: skip
        print(f"  {r['name']:30}" + "".join(f"{c:>14}" for c in cells))


if __name__ == "__main__":
    main()
