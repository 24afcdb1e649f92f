"""Remove each barrier, wait and mask of the CUDA kernels in turn: `cuda_mutations.py [FILE[:LINE,LINE...] ...]` prints
what notices.

A change is noticed if the changed kernels do not compile, the emulator finds an error, the process crashes, or a result
has other bits than the unchanged kernels give, in any order of the threads. For what none of this shows, a comment of
its line says why: "redundant" of what a GPU's results do not depend on either, with what it stands for all the same;
"unseen:" of what a GPU does need, with what the emulator does otherwise.

Barriers and waits are found by their names. Masks are listed in cuda_masks.py; a listed text that is not there is an
error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from cuda_masks import MASKS

from itm_fast import _cuda, _native
from itm_fast.ops._cuda import _pairs

WAITS = re.compile(
    r"(?:emulator::)?(__syncthreads\(\)|sync_warp\(\)|wait_groups<.*?>\(\)"
    r"|group_wait<.*?>\(.*?\)|group_fence\(.*?\)|fence_products\(\)"
    r"|cluster_barrier\(\)|fence_barriers\(\)|arrive_at_other\(.*?\)|expect_bytes\(.*?\)|wait_for\(.*\)"
    r"|(?:matrices|regions)\.(?:wait|pass)\(\));"
)
ORDERS = (0, 1, 2, 3)
EXCUSES = "redundant", "unseen:"  # see above
ENDLESS = 1800  # seconds: what takes longer waits in vain


class Change(NamedTuple):
    """One change of a file: in `line`, from 1, `text` at `place` of the whole becomes `to`."""

    file: str
    line: int
    place: int
    text: str
    to: str

    def made(self, source: str) -> str:
        return source[: self.place] + self.to + source[self.place + len(self.text) :]


def changes(file: str, source: str) -> Iterator[Change]:
    found = [(match.start(), match[0], ";") for match in WAITS.finditer(source)]
    for text, to in MASKS.get(file, ()):
        if text not in source:
            raise ValueError(f"{file} has no {text!r}")
        found += [(match.start(), text, to) for match in re.finditer(re.escape(text), source)]
    for place, text, to in sorted(found):
        yield Change(file, source.count("\n", 0, place) + 1, place, text, to)


def scan(op: ModuleType) -> Iterator[torch.Tensor]:
    """Scores of `cross_attention_score` in all that its kernels do differently."""
    from itm_fast.ops._cuda import _rows
    from itm_fast.testing import inputs

    run = op.forward
    # Tiles with empty slots, a group with fewer images than fit, images of fewer regions, a last stage half full.
    image, words, edge = inputs(5, (100, 7, 30, 1, 12), 34, 136, dtype=torch.float32)
    counts = torch.tensor([34, 2, 34, 19, 7])
    for i, n in enumerate(counts):
        image[i, n:] = torch.nan  # which must not be read
    for direction in ("t2i", "i2t"):
        for norm, dtype in (("clipped_l2norm", torch.float32), ("softmax", torch.float32), ("none", torch.float16)):
            yield run(image.to(dtype), words.to(dtype), edge, counts, direction, norm, 9.0, "lse", 6.0)
    image = image.nan_to_num(0.5)
    image[1, 1] = words[105] = torch.nan  # image 0 has columns beside those of image 1
    yield run(image, words, edge, None, "t2i", "l2norm", 9.0, "sum", 6.0)
    image, words = image.nan_to_num(0.5), words.nan_to_num(0.5)
    for spread in ((image[1, 0], words[110]), ()):  # wide rows of some pairs, of all
        for row in spread:
            row *= 2.0 ** torch.arange(136.0).remainder(30)
        low = _rows.LOW
        if not spread:
            _rows.LOW = torch.inf
        for direction in ("t2i", "i2t"):
            yield run(image, words, edge, counts, direction, "l1norm", 9.0, "max", 6.0)
        _rows.LOW = low


# Products by groups of warps, of blocks alone and in clusters.
HALF_BY_GROUPS = (_cuda.SPECIFIC, torch.float16, _cuda.GROUPS)
HALF_IN_CLUSTERS = (_cuda.SPECIFIC, torch.float16, _cuda.CLUSTERS)
PAIRS_BY_GROUPS = (_cuda.SPECIFIC, torch.float32, _cuda.GROUPS)
PAIRS_IN_CLUSTERS = (_cuda.SPECIFIC, torch.float32, _cuda.CLUSTERS)
Run = tuple[tuple[int, int], torch.dtype, int]
HEADS = "graph", "filter"


def score(op: ModuleType, runs: tuple[Run, ...], heads: Iterable[str] = HEADS) -> Iterator[torch.Tensor]:
    """Scores of the pair scorers: for GPUs of some compute capabilities in some dtypes, by variants of the kernels."""
    import test_cuda_nodes as cases

    for head, steps in ((h, n) for h in heads for n in ((3, 1) if h == "graph" else (1,))):
        args = cases.case(head, **cases.MIXED, K=steps)
        for i, n in enumerate(cases.MIXED["regions"]):
            args[0][i, n:] = torch.nan  # which must not be read
        # A word of caption 4, in a tile with caption 2; the global vector of caption 1, in another tile with others.
        args[2][38, 3] = args[3][1, 0] = torch.nan
        name = f"similarity_{head}_score"
        for capability, dtype, variant in runs:
            if dtype == torch.float32 and variant != _cuda.GENERAL:
                continue  # see below
            torch.cuda.get_device_capability = lambda *_, of=capability: of  # type: ignore[assignment]
            _cuda.allow_variant(name, args[0].device, dtype, variant)
            yield getattr(op, name)(*cases.rounded(args, dtype))
    for capability, dtype, variant in runs:
        if variant == _cuda.GENERAL:
            continue
        torch.cuda.get_device_capability = lambda *_, of=capability: of  # type: ignore[assignment]
        if dtype == torch.float32 and "graph" not in heads:
            continue
        if dtype == torch.float32:  # of the published S
            args = cases.case("graph", **cases.SHAPES["S256-odd"])
            _cuda.allow_variant("similarity_graph_score", args[0].device, dtype, variant)
            yield op.similarity_graph_score(*cases.rounded(args, dtype))
            continue
        for head in heads:  # several stages of each matrix
            name, args = f"similarity_{head}_score", cases.case(head, **cases.SHAPES["S256"])
            _cuda.allow_variant(name, args[0].device, torch.bfloat16, variant)
            yield getattr(op, name)(*cases.rounded(args, torch.bfloat16))
            if head == "filter":  # more than there are places for
                args = cases.case(head, **cases.SHAPES["odd"] | dict(D=600))
                yield getattr(op, name)(*cases.rounded(args, dtype))
    if any(variant == _cuda.GENERAL for _, _, variant in runs):
        torch.cuda.get_device_capability = lambda *_: (7, 5)  # type: ignore[assignment]
        for head in heads:  # tiles of fewer rows than a block's warps could have
            args = cases.case(head, **cases.SHAPES["S256"])
            yield getattr(op, f"similarity_{head}_score")(*cases.rounded(args, torch.float16))
        if "graph" in heads:
            torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
            yield op.similarity_graph_score(*cases.rounded(cases.with_infinite_empty_rows(), torch.float16))


class Judge(NamedTuple):
    """What tells whether kernels still compute the same.

    Attributes:
        stems: the .cu files that are built.
        instances: a pattern of the names that are built of them.
        op: module of itm_fast.ops._cuda.
        results: calls the functions of this module, and yields what they return.
    """

    stems: tuple[str, ...]
    instances: str
    op: str
    results: Callable[..., Iterator[torch.Tensor]]


LOST = (0, 3, 8, 13, 21)  # messages between the blocks of a cluster before one that is lost
HURRIED = range(0, 24)  # waits of the blocks of a cluster before one that gives up too early


def lossy(op: ModuleType) -> Iterator[torch.Tensor]:
    """Scores by blocks in clusters, also where one waits in vain; and whether the host is told."""
    import cuda_emulated
    import test_cuda_nodes as cases

    yield from score(op, (HALF_IN_CLUSTERS,))
    capability, dtype, variant = HALF_IN_CLUSTERS
    torch.cuda.get_device_capability = lambda *_: capability  # type: ignore[assignment]
    args = cases.rounded(cases.case("filter", **cases.SHAPES["odd"] | dict(D=600)), dtype)
    module = cuda_emulated.load()
    for event, number in [*((module.lose, n) for n in LOST), *((module.hurry, n) for n in HURRIED)]:
        _cuda.allow_variant("similarity_filter_score", args[0].device, dtype, variant)
        event(number)
        yield op.similarity_filter_score(*args)
        yield torch.tensor([_cuda.cluster_fault(args[0].device)])
        _cuda._gave_up.clear()


def scan_in_clusters(op: ModuleType) -> Iterator[torch.Tensor]:
    """The same of blocks in clusters, of which one has no tile, with more stages than places for them."""
    from itm_fast.testing import inputs

    torch.cuda.get_device_capability = lambda *_: _cuda.SPECIFIC  # type: ignore[assignment]
    image, words, edge = inputs(9, (127, 12, 100, 30, 1), 36, 328, dtype=torch.float32)
    counts = torch.tensor([36, 2, 36, 19, 7, 36, 36, 1, 30])
    for direction in ("t2i", "i2t"):
        yield op.forward(image.half(), words.half(), edge, counts, direction, "clipped_l2norm", 9.0, "lse", 6.0)
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]


def all_scans(op: ModuleType) -> Iterator[torch.Tensor]:
    yield from scan(op)
    yield from scan_in_clusters(op)


SCAN = Judge(("scan",), r"<(F16|F16X3|TF32X3), 36, 128, (2, )?3>", "cross_attention_score", all_scans)
MORE_STAGES = "BF16, (36, 128, 2|256, 128, 64(, 48, false, 128)?)"
WIDE_PAIRS = "F16X3, (36, 128, 2|256, 64, 64|256, 128, 32, 48, true, 64)"
SCORE = Judge(
    ("weights", "global_nodes", "graph", "filter"),
    r"<((F16|F16X3), (36, 128, 2|64, (64|128), 64|64, 128, 64, 48(, false, 128)?)|"
    rf"F16, (36, 128, 1|256, 64, 32|256, (32|64), 16, 48)|{MORE_STAGES}|{WIDE_PAIRS})>",
    "similarity_score",
    partial(
        score,
        runs=(
            *(((8, 0), torch.float16, 0), (_cuda.SPECIFIC, torch.float32, 0), HALF_BY_GROUPS, HALF_IN_CLUSTERS),
            *(PAIRS_BY_GROUPS, PAIRS_IN_CLUSTERS),
        ),
    ),
)
GROUPS = SCORE._replace(
    instances=r"<(F16, (36, 128, 2|64, 128, 64|64, 128, 64, 48, false, 128)|" + f"{MORE_STAGES}|{WIDE_PAIRS})>",
    results=partial(score, runs=(HALF_BY_GROUPS, HALF_IN_CLUSTERS, PAIRS_BY_GROUPS, PAIRS_IN_CLUSTERS)),
)
CLUSTERS = GROUPS._replace(
    instances=r"(weights|nodes|in_clusters)" + GROUPS.instances.replace(f"|{WIDE_PAIRS}", ""),
    results=lossy,
)


def of_head(judge: Judge, head: str) -> Judge:
    """What of `judge` concerns one head."""
    return judge._replace(stems=("weights", "global_nodes", head), results=partial(judge.results, heads=(head,)))


JUDGES: dict[str, Judge] = {
    **dict.fromkeys(("affinity.h", "attention.h", "scan.cu"), SCAN),
    **dict.fromkeys(("tile.h", "nodes.h", "global_nodes.cu", "weights.cu"), SCORE),
    **dict.fromkeys(("steps.h", "last_step.h", "graph.cu"), of_head(SCORE, "graph")),
    **{"filter.cu": of_head(SCORE, "filter"), "group_steps.h": of_head(GROUPS, "graph")},
    **dict.fromkeys(("groups.h", "hopper.h"), GROUPS),
    **dict.fromkeys(("stream.h", "cluster.h"), CLUSTERS),
}


def results(judge: Judge, want: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """The results of the kernels in the folder that `_native.csrc_dir` names: in all orders, or up to the first one in
    which they are not those wanted."""
    import importlib

    import cuda_emulated

    built = {s: [n for n in cuda_emulated.INSTANCES[s] if re.search(judge.instances, n)] for s in judge.stems}
    cuda_emulated.INSTANCES.clear()
    cuda_emulated.INSTANCES.update(built)
    module = cuda_emulated.load()
    if isinstance(module, str):
        raise RuntimeError(module)
    device = cuda_emulated.Device(module)
    _pairs.COMPARED = _pairs.SIMILARITIES
    _cuda.launch = device.launch  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: device.capability  # type: ignore[assignment]
    op = importlib.import_module(f"itm_fast.ops._cuda.{judge.op}")
    found = []
    for device.order in ORDERS:
        found += [result.float().nan_to_num(12345.0) for result in judge.results(op)]
        if want and differing(found, want):
            break
    return found


def differing(found: list[torch.Tensor], want: list[torch.Tensor]) -> int:
    return sum(not torch.equal(a, b) for a, b in zip(found, want))


def judge_in_process(file: str, csrc: str, out: str) -> None:
    """The work of a process: write the results of kernels in a folder."""
    _native.csrc_dir = lambda: Path(csrc)  # type: ignore[attr-defined]
    wanted = Path(csrc, "wanted.pt")
    torch.save(results(JUDGES[file], torch.load(wanted) if wanted.is_file() else None), out)


def judged(file: str, csrc: Path) -> list[torch.Tensor] | str:
    """The results of kernels in a folder, or what went wrong; `wanted.pt` there has those of the unchanged kernels."""
    out = csrc / "results.pt"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "ITM_FAST_CACHE_DIR": str(csrc / "cache")}
    command = [sys.executable, __file__, "--judge", file, str(csrc), str(out)]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=ENDLESS)
    except subprocess.TimeoutExpired:
        return "does not end"
    if ended.returncode == 0:
        return torch.load(out)
    if ended.returncode < 0:
        return f"signal {-ended.returncode}"
    return ended.stderr.strip().splitlines()[-1][:100]


def verdict(found: list[torch.Tensor] | str, want: list[torch.Tensor]) -> str:
    if isinstance(found, str):
        return found
    other = differing(found, want)
    return f"{other} of {len(found)} results" if other else "unnoticed"


def main(files: list[str]) -> int:
    """Print a line for each change; return how many go unnoticed that no comment of their line excuses."""
    cuda, missed = _native.csrc_dir() / "cuda", 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cuda"
        folder.mkdir()
        sources = {file.name: file.read_text() for file in cuda.iterdir()}
        for name, text in sources.items():
            (folder / name).write_text(text)
        for file, _, only in (name.partition(":") for name in files or JUDGES):
            Path(scratch, "wanted.pt").unlink(missing_ok=True)
            want = judged(file, Path(scratch))
            if isinstance(want, str):
                raise RuntimeError(f"the unchanged kernels fail: {want}")
            torch.save(want, Path(scratch, "wanted.pt"))
            for change in (c for c in changes(file, sources[file]) if not only or str(c.line) in only.split(",")):
                (folder / file).write_text(change.made(sources[file]))
                said = verdict(judged(file, Path(scratch)), want)
                line = sources[file].splitlines()[change.line - 1]
                if said == "unnoticed":
                    said = next((word.strip(":") for word in EXCUSES if word in line), "UNNOTICED")
                    missed += said == "UNNOTICED"
                print(f"{file}:{change.line:<4} {change.text[:60]:<60} {said}", flush=True)
            (folder / file).write_text(sources[file])
    return missed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--judge"]:
        judge_in_process(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
