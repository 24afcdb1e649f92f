"""How far the gradients of a training step are from float64's, by products of float32 and of bfloat16 values.

    python benchmarks/bench_gradients.py --threads 2 --write cpu

The package's trained models on their held-out pictures, a caption each; on random rows of length 1 with 1024 numbers
SCAN, and SGR and SAF with the weights that training begins with. The loss is that of the papers, by the hardest
negatives and by all; its gradient of the scores is float64's in every row, for rounding may change which negative is
the hardest. Deviations are lengths of differences, as shares of the length of float64's gradient. "rounded features"
are in float64 from features rounded to bfloat16: what products of bfloat16 values cannot avoid.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, machine
from benchmarks.bench_precision import load
from benchmarks.bench_training_step import SCALE, ranking_loss
from benchmarks.shapes import Shape
from itm_fast.data import Vocabulary, open_split
from itm_fast.data.openclipart import FOLDER, VOCABULARY
from itm_fast.evaluation import encode
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models.sgraf import EncoderSimilarity
from itm_fast.nn import CrossAttentionScore

TITLES = {"sgr": "SGR, trained", "saf": "SAF, trained", "scan": "SCAN t2i, trained"}
WAYS = {  # name: dtype, backend, products, features rounded
    "float64": (torch.float64, "torch", "float32", False),
    "float32": (torch.float32, "cpu", "float32", False),
    "bfloat16 products": (torch.float32, "cpu", "bfloat16", False),
    "rounded features": (torch.float64, "torch", "float32", True),
}
Case = tuple[torch.nn.Module, Tensor, Tensor, Tensor]


def trained(name: str, pairs: int) -> Case:
    """A trained model's scorer; the first pictures, encoded, and a caption of each."""
    model = load(name, "cpu")
    found = encode(model, open_split(FOLDER, "test"), Vocabulary.load(VOCABULARY), progress=False)
    owner, edge = found.caption_to_image.tolist(), found.cu_seqlens.tolist()
    captions = [owner.index(image) for image in range(pairs)]
    words = [found.words[edge[t] : edge[t + 1]] for t in captions]
    cu_seqlens = torch.tensor([0, *(len(w) for w in words)]).cumsum(0).int()
    return model.scorer, found.image[:pairs], torch.cat(words), cu_seqlens


def random(model: str, pairs: int) -> Case:
    """SCAN with the papers' temperature, SGR or SAF with new weights, on random rows of length 1 with 1024 numbers."""
    shape = Shape("coco-eval-5k", pairs, pairs)
    image, words, cu_seqlens = shape.features("cpu")
    rows = (torch.nn.functional.normalize(x, dim=-1) for x in (image, words))
    torch.manual_seed(0)
    if model in SCALE:
        return CrossAttentionScore(model, scale=SCALE[model]), *rows, cu_seqlens
    return EncoderSimilarity(image.shape[-1], WORKLOADS[shape.workload].similarity, model).eval(), *rows, cu_seqlens


def gradients(case: Case, way: str, upstream: Tensor | None, hardest: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of images, words and all parameters in one, in float64; and that of the scores, made if it is None."""
    dtype, backend, products, rounded = WAYS[way]
    scorer, image, words, cu_seqlens = case
    scorer = copy.deepcopy(scorer).to(dtype).requires_grad_()
    rows = [(x.bfloat16() if rounded else x).to(dtype).requires_grad_() for x in (image, words)]
    with harness.products(products), itm_fast.use_backend(backend):
        score = scorer(*rows, cu_seqlens)
        if upstream is None:
            leaf = score.detach().requires_grad_()
            (upstream,) = torch.autograd.grad(ranking_loss(leaf, hardest), leaf)
        weights = list(scorer.parameters())
        found = torch.autograd.grad(score, [*rows, *weights], upstream.to(dtype), materialize_grads=True)
    result = {"images": found[0].double(), "words": found[1].double()}
    if weights:
        result["parameters"] = torch.cat([x.double().flatten() for x in found[2:]])
    return result, upstream


def measure(case: Case) -> list[dict]:
    """A row for each loss and each way but float64."""
    rows = []
    for hardest in (True, False):
        exact, upstream = gradients(case, "float64", None, hardest)
        for way in list(WAYS)[1:]:
            found = gradients(case, way, upstream, hardest)[0]
            off = {name: ((x - exact[name]).norm() / exact[name].norm()).item() for name, x in found.items()}
            rows.append({"loss": "hardest" if hardest else "all", "name": way, **off})
    return rows


def table(result: dict) -> str:
    """A Markdown row per model, loss and way."""
    e, heads = result["environment"], ("images", "words", "parameters")
    how = (
        f"Gradients of {result['pairs']} x {result['pairs']} pairs against float64's, as shares of their length; "
        f"{e['device']}; torch {e['torch']}; {e['date']}; commit {e['commit']}."
    )
    lines = [f"| model | negatives | products | {' | '.join(heads)} |", "|---|---|---|---:|---:|---:|"]
    for one in result["results"]:
        for r in one["rows"]:
            cells = " | ".join(f"{r[head]:.1e}" if head in r else "" for head in heads)
            lines.append(f"| {one['model']} | {r['loss']} | {r['name']} | {cells} |")
    return f"{how}\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24, help="pictures, each with one caption (default: 24)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--write", metavar="NAME", help="save benchmarks/results/gradients_NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = {title: trained(name, args.pairs) for name, title in TITLES.items()}
    cases |= {f"SCAN {direction}, random rows": random(direction, args.pairs) for direction in SCALE}
    cases |= {f"{model}, untrained, random rows": random(model, args.pairs) for model in ("SGR", "SAF")}
    results = [{"model": title, "rows": measure(case)} for title, case in cases.items()]
    result = {"environment": machine.environment(), "pairs": args.pairs, "results": results}
    print(table(result))
    if args.write:
        print(harness.write(f"gradients_{args.write}", result))


if __name__ == "__main__":
    main()
