"""All-pairs reductions that other packages compute too: MaxSim (maxsim-cpu, pykeops) and plain softmax attention.

    python benchmarks/bench_maxsim.py --threads 2 --rounds 3 --write cpu

maxsim: sum over words of the largest word-region product, cross_attention_score with weights "hard", similarity
"product" and pool "sum". The operations that a result needs are counted as the products only. D is 128 in ColBERT and
1024 in SCAN and SGRAF.

attention: mean over words of the cosine with the softmax-weighted regions (scale 9), which is cross_attention_score
with affinity_norm "none" and pool "mean"; in KeOps it is one `sumsoftmaxweight`.

bfan, chan, naaf: the pair scores of these models in evaluation, against the loops of their published code. Which
regions count in BFAN and NAAF may differ by a rounding, so their results are compared in float64.

The packages are optional: pip install maxsim-cpu pykeops. Each is tried in a new process first. If it is missing or
crashes, it is left out, and the result says why.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from a bare checkout, `benchmarks` and `itm_fast` lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks import harness, machine
from benchmarks.shapes import Shape
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models import scorer
from itm_fast.testing import bfan, chan, inputs, naaf, scan

MODELS: dict[str, tuple[dict, Callable[..., Tensor], dict]] = {  # a model's options, its loop, and the loop's options
    "bfan": ({}, bfan.loop, {}),
    "chan": ({}, chan.loop, {}),
    "naaf": ({"thres_safe": 0.2}, naaf.loop, {"threshold": 0.2}),
}
# D
TASKS = {"maxsim-d128": 128, "maxsim-d1024": 1024, "attention-d1024": 1024} | {f"{m}-d1024": 1024 for m in MODELS}
SOFT = 9.0
ALLOWED = 1e-4
Scores = Callable[[], Tensor]


class Block:
    """Images and captions in every form that the contenders take, made before anything is timed."""

    def __init__(self, images: int, captions: int, D: int, device: str) -> None:
        shape = Shape("coco-eval-5k", images, captions)
        self.images, self.captions, self.lengths = images, captions, shape.lengths
        self.regions, self.dim = WORKLOADS[shape.workload].regions, D
        self.image, self.words, self.cu_seqlens = inputs(
            images, self.lengths, self.regions, D, device=device, dtype=torch.float32
        )
        self.caption = itm_fast.unpack(self.words, self.cu_seqlens)
        self.owner = torch.arange(captions, device=device).repeat_interleave(self.cu_seqlens.diff().long())

    def per_caption(self, value: Tensor) -> Tensor:
        """Sums over each caption's words: [I, N] -> [I, T]."""
        return value.new_zeros(len(value), self.captions).index_add_(1, self.owner, value)

    def flops(self, task: str) -> float:
        """Word-region products; where there is attention also the Gram form's quadratic, as in `shapes.needed_flops`:
        for BFAN in both directions, for NAAF of one of its two attentions."""
        quadratic = {"maxsim": 0, "chan": 0}.get(model_of(task), 2 * self.regions + 4)
        found = 0.0
        for n in self.lengths:
            both = 2 * n + 4 if model_of(task) == "bfan" else 0
            found += n * (2 * self.dim + quadratic + both)
        return self.images * self.regions * found

    def double(self, images: int, captions: int) -> Block:
        """A part of the block in float64."""
        part = copy.copy(self)
        part.images, part.captions, part.lengths = images, captions, self.lengths[:captions]
        n = sum(part.lengths)
        part.image, part.words = self.image[:images].double(), self.words[:n].double()
        part.cu_seqlens, part.caption = self.cu_seqlens[: captions + 1], self.caption[:captions].double()
        return part


def model_of(task: str) -> str:
    """ "maxsim", "attention" or a model's name."""
    return task.partition("-")[0]


def loop(block: Block, task: str) -> Scores:
    """One caption an iteration, all images at once; CHAN's code takes the whole block."""
    if model_of(task) in MODELS:
        _, run, own = MODELS[model_of(task)]
        return lambda: run({}, block.image, block.caption, block.lengths, **own)
    if task.startswith("attention"):
        options = {"affinity_norm": "none", "scale": SOFT, "pool": "mean"}
        return lambda: scan.loop(block.image, block.caption, block.lengths, **options)
    captions = block.words.split(block.lengths)
    return lambda: torch.stack([(block.image @ words.t()).amax(1).sum(1) for words in captions], 1)


def one_product(block: Block, task: str) -> Scores:
    """All words with all regions by one matrix product, then the reduction."""

    def run() -> Tensor:
        product = block.image.flatten(0, 1) @ block.words.t()
        product = product.view(block.images, block.regions, -1)
        if task.startswith("maxsim"):
            return block.per_caption(product.amax(1))
        alpha = (SOFT * product).softmax(1)
        gram = block.image @ block.image.transpose(1, 2)
        norm = ((gram @ alpha) * alpha).sum(1).sqrt() * block.words.norm(dim=1)
        return block.per_caption((alpha * product).sum(1) / norm) / block.cu_seqlens.diff()

    return run


def ours(block: Block, task: str, backend: str) -> Scores:
    """cross_attention_score, or a model's pair scorer."""
    arguments = block.image, block.words, block.cu_seqlens
    if model_of(task) in MODELS:
        model = scorer(model_of(task), dim=block.dim, **MODELS[model_of(task)][0]).eval()

        def run() -> Tensor:
            with torch.no_grad(), itm_fast.use_backend(backend):
                return model(*arguments)

        return run
    hard = {"weights": "hard", "similarity": "product", "pool": "sum"}
    options = {"affinity_norm": "none", **(hard if task.startswith("maxsim") else {"scale": SOFT, "pool": "mean"})}
    return lambda: itm_fast.cross_attention_score(*arguments, backend=backend, **options)


def maxsim_cpu(block: Block, task: str) -> Scores:
    """One query (the caption's words) an iteration against all documents (the images' regions)."""
    import maxsim_cpu as package

    queries = [words.numpy() for words in block.words.split(block.lengths)]
    documents = block.image.numpy()
    return lambda: torch.stack([torch.as_tensor(package.maxsim_scores(q, documents)) for q in queries], 1)


def pykeops(block: Block, task: str) -> Scores:
    """A symbolic [I, N, R] array of products, reduced over the regions."""
    from pykeops.torch import LazyTensor

    word = LazyTensor(block.words[None, :, None].contiguous())
    region = LazyTensor(block.image[:, None].contiguous())
    product = (word * region).sum(-1)
    if task.startswith("maxsim"):
        return lambda: block.per_caption(product.max(dim=2)[..., 0])

    def run() -> Tensor:
        attended = (SOFT * product).sumsoftmaxweight(region, dim=2)  # [I, N, D]
        cosine = torch.nn.functional.cosine_similarity(attended, block.words[None], dim=2)
        return block.per_caption(cosine) / block.cu_seqlens.diff()

    return run


PACKAGES = {"maxsim-cpu": maxsim_cpu, "pykeops": pykeops}


def tried(package: str, task: str, images: int, captions: int) -> str | None:
    """Why a package cannot take part, or None. Must run in a new process, which the package may crash."""
    try:
        PACKAGES[package](Block(images, captions, TASKS[task], "cpu"), task)()
    except Exception as why:  # whatever another package raises
        return f"{type(why).__name__}: {why}"
    return None


def unusable(package: str, task: str, images: int, captions: int) -> str | None:
    """Why a package cannot take part here, or None."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return "it is not installed"
    harness.progress(f"{task}: {package} tried in a process of its own")
    try:
        return machine.in_fresh_process(tried, package, task, images, captions)
    except RuntimeError as died:
        return str(died)


def late_interaction(block: Block) -> Callable[[], Tensor]:
    """MaxSim by late-interaction-kernels, for CUDA tensors."""
    from late_interaction_kernels import maxsim_varlen

    bounds = torch.arange(
        0, block.images * block.regions + 1, block.regions, dtype=torch.int32, device=block.image.device
    )
    packed, longest = block.image.flatten(0, 1), max(block.lengths)
    return lambda: maxsim_varlen(block.words, packed, block.cu_seqlens, bounds, longest, block.regions).t()


def flash_maxsim(block: Block) -> Callable[[], Tensor]:
    """MaxSim by flash-maxsim, for CUDA tensors."""
    from flash_maxsim import flash_maxsim_batched

    lengths = block.cu_seqlens.diff()
    return lambda: flash_maxsim_batched(block.caption, block.image, query_lengths=lengths).t()


def measure(task: str, images: int, captions: int, rounds: int, device: str) -> dict:
    """All contenders of one task."""
    block = Block(images, captions, TASKS[task], device)
    calls, left_out = {"loop over captions": loop(block, task)}, dict[str, str]()
    if model_of(task) not in MODELS:
        calls["one matrix product"] = one_product(block, task)
    for name, make in PACKAGES.items() if model_of(task) not in MODELS else ():
        if name == "maxsim-cpu" and task.startswith("attention"):
            continue
        if why := unusable(name, task, images, captions):
            left_out[name] = why
        else:
            calls[name] = make(block, task)
    for backend in harness.backends(device):
        calls[f"itm-fast {backend}"] = ours(block, task, backend)
    off: dict[str, float] = {}
    if model_of(task) in MODELS:
        part = block.double(min(images, 16), min(captions, 16))
        checked = {n: ours(part, task, n.split()[-1]) for n in calls if n.startswith("itm-fast")}
        exact, checked = loop(part, task)(), {**calls, **checked, "loop over captions": loop(part, task)}
    else:
        exact, checked = loop(block, task)(), calls
    for name in list(calls):
        try:
            off[name] = harness.largest_difference(checked[name](), exact)
        except NotImplementedError as why:
            left_out[name] = str(why)
            del calls[name]
            continue
        if not off[name] < ALLOWED:
            raise SystemExit(f"{task}: {name} differs from the loop by {off[name]:.2g}; not timed")
    times = harness.alternate(calls, rounds)
    base, pairs, flops = statistics.median(times["loop over captions"]), images * captions, block.flops(task)
    rows = [harness.row(n, t, pairs, flops, base, largest_difference=off[n]) for n, t in times.items()]
    size = {"images": images, "captions": captions, "dim": block.dim}
    return {"model": task, **size, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--write", metavar="NAME", help="save benchmarks/results/maxsim_NAME.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak, results = machine.peaks(device), []
    for task in args.tasks:
        results.append(measure(task, args.images, args.captions, args.rounds, device))
        peak = machine.higher(peak, machine.peaks(device))
        harness.hold_against(peak, results)
        harness.show(
            f"{task}: {args.images} images x {args.captions} captions", results[-1]["rows"], results[-1]["left_out"]
        )
    if args.write:
        head = machine.head("coco-eval-5k", args.rounds, peak)
        print(harness.write(f"maxsim_{args.write}", {**head, "results": results}))


if __name__ == "__main__":
    main()
