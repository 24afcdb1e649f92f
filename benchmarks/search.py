"""Two-stage search against exact search: recall, time and memory, on the packaged pictures and on synthetic images.

    PYTHONPATH=. python benchmarks/search.py           # writes benchmarks/results/search_cpu.json; about ten minutes

The packaged gallery has 1,000 pictures and three trained models. The synthetic one has 100,000 images of 36 regions in
32 dimensions: an image shows 6 of 500 things, random unit vectors; a region is one of these plus noise of half the
length; a caption names 4 of the things of an image. SCAN scores them with the identity for encoders. What a first stage
finds there says little about real pictures; how the time and memory grow with the gallery is the same.

Recall is the share of the 10 best images of exact search that two-stage search finds. It is no recall of the models.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness, machine
from itm_fast import Gallery
from itm_fast.data import Split, Vocabulary, open_split
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
from itm_fast.gallery.pooled import FaissIndex
from itm_fast.models import Loaded, build, load
from itm_fast.training import options

K = 10
SHOWN, NAMED = 6, 4  # things of an image, and of a caption


class Words(nn.Module):
    """A text encoder that looks words up, and nothing else."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.embed_size = vectors.shape[1]
        self.embed = nn.Embedding.from_pretrained(vectors)

    def forward(self, ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Word ids [B, W] -> [B, W, D], and the lengths."""
        return self.embed(ids), torch.as_tensor(lengths)


def synthetic(folder: Path, images: int, captions: int, things: int = 500, regions: int = 36, dim: int = 32):
    """A model and a split; its features are in `folder`, in half precision."""
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        drawn = rng.standard_normal((*shape, dim), dtype=np.float32)
        return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    names, vectors = [f"thing{n}" for n in range(things)], unit(things)
    vocabulary = Vocabulary.build(names, min_count=1)
    table = torch.zeros(len(vocabulary), dim)
    table[[vocabulary(name) for name in names]] = torch.from_numpy(vectors)
    shown = rng.integers(0, things, (images, SHOWN))
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (images, regions, dim))
    for start in range(0, images, 4096):
        part = shown[start : start + 4096]
        chosen = np.take_along_axis(part, rng.integers(0, SHOWN, (len(part), regions)), axis=1)
        features[start : start + 4096] = vectors[chosen] + unit(len(part), regions) / 2
    owner = rng.choice(images, captions, replace=False)
    texts = [" ".join(names[thing] for thing in rng.permutation(shown[image])[:NAMED]) for image in owner]

    opt = vars(options("scan", img_dim=dim, embed_size=dim))
    model: Any = build(Namespace(**opt, vocab_size=len(vocabulary), device="cpu"))
    with torch.no_grad():
        model.img_enc.fc.weight.copy_(torch.eye(dim))
        model.img_enc.fc.bias.zero_()
    model.txt_enc = Words(table)
    model.val_start()
    return Loaded(model, vocabulary, "SCAN t2i"), Split(features, texts, owner)


def measure(
    name: str,
    gallery: Gallery,
    first: Loaded,
    captions: list[str],
    candidates: Sequence[int],
    rounds: int,
    index: Any = None,
) -> dict:
    """Recall over `captions`; seconds of one caption alone, median of `rounds` captions, and of each of all at once.

    Exact and two-stage searches of a caption follow each other, so that both meet the same load of the machine.
    """

    def exact(texts: list[str]) -> float:
        return gallery.search(texts, K).seconds

    def two_stage(texts: list[str], n: int) -> float:
        return gallery.search(texts, K, candidates=n, first=first, index=index, sample=captions).seconds

    recalls = [
        gallery.recall(K, candidates=n, first=first, index=index, sample=captions, progress=True) for n in candidates
    ]
    alone: list[list[float]] = []
    for caption in captions[:rounds]:
        alone.append([exact([caption]), *(two_stage([caption], n) for n in candidates)])
    seconds = [statistics.median(column) for column in zip(*alone, strict=True)]
    together = [exact(captions), *(two_stage(captions, n) for n in candidates)]
    about = gallery.about
    return {
        "gallery": name, "images": len(gallery), "regions": about.regions, "dim": about.dim, "dtype": about.dtype,
        "model": gallery.model.name, "first": first.name, "index": recalls[0].index, "captions": len(captions),
        "rounds": rounds, "bytes": (gallery.path / "image.npy").stat().st_size,
        "exact_memory_bytes": machine.peak_memory(lambda: exact(captions)),
        "exact_seconds_alone": seconds[0], "exact_seconds_each": together[0] / len(captions),
        "two_stage": [
            {**recall.to_dict(), "seconds_alone": one, "seconds_each": all_ / len(captions)}
            for recall, one, all_ in zip(recalls, seconds[1:], together[1:], strict=True)
        ],
    }  # fmt: skip


def table(result: dict) -> str:
    """The results page's table."""
    made, first = result["environment"], result["results"][0]
    held = [one for one in result["results"] if one["exact_memory_bytes"] and one["index"] == first["index"]]
    memory = ", ".join(
        f"{one['exact_memory_bytes'] / 1e6:,.0f} MB for {one['bytes'] / 1e6:,.0f} MB of rows ({one['gallery']}, "
        f"{one['model']}, {one['dtype']})"
        for one in held
    )
    lines = [
        f"{made['device']}; {made['threads']} thread; torch {made['torch']}; {made['date']}; commit {made['commit']}. "
        "The share of the 10 best images of exact search that two-stage search finds, which is no recall of the model; "
        "milliseconds a caption, the median of one searched alone, and each of all captions searched at once. Memory "
        f"of exact search with all captions: {memory}. The synthetic images are random vectors: times grow as with "
        "real pictures, but what is found there says little about them. With many captions at once, exact search of "
        "1,000 pictures is faster than most of the two-stage rows.",
        "",
        "| gallery | model, first stage, index | candidates | found (95 % interval) | alone | exact alone | at once | "
        "exact at once |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["results"]:
        for row in one["two_stage"]:
            times = row["seconds_alone"], one["exact_seconds_alone"], row["seconds_each"], one["exact_seconds_each"]
            found = f"{row['of_exact_search']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
            lines.append(
                f"| {one['gallery']}, {one['images']:,} images | {one['model']}, {one['first']}, {one['index']} | "
                f"{row['candidates']:,} | {found} | " + " | ".join(f"{1000 * time:,.1f}" for time in times) + " |"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="of the synthetic gallery")
    parser.add_argument("--captions", type=int, default=200, help="on which recall is measured")
    parser.add_argument("--rounds", type=int, default=9, help="captions that are searched alone")
    parser.add_argument("--candidates", type=int, nargs="+", default=[50, 100, 200, 1000])
    parser.add_argument("--models", nargs="+", default=["scan", "sgr", "saf"], help="of the packaged gallery")
    args = parser.parse_args(words)
    results = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        scan, split = load(CHECKPOINTS["scan"], "cpu"), open_split(FOLDER, "test")
        chosen = list(dict.fromkeys(split.captions))
        chosen = [chosen[n] for n in np.random.default_rng(0).permutation(len(chosen))[: args.captions]]
        for name in args.models:
            gallery = Gallery.build(load(CHECKPOINTS[name], "cpu"), split, folder / name, first=scan)
            few = [n for n in args.candidates if n < len(gallery)]
            results.append(measure("pictures", gallery, scan, chosen, few, args.rounds))
        model, split = synthetic(folder, args.images, args.captions)
        gallery = Gallery.build(model, split, folder / "synthetic", dtype="float16")
        indexes: list[Any] = [None]
        if find_spec("faiss"):
            (vectors,) = gallery.path.glob("pooled-*.npy")
            indexes.append(FaissIndex(np.load(vectors, mmap_mode="r")))
        for index in indexes:
            results.append(measure("synthetic", gallery, model, split.captions, args.candidates, args.rounds, index))
    found = {"environment": machine.environment(), "k": K, "results": results}
    print(table(found))
    print(harness.write("search_cpu", found))


if __name__ == "__main__":
    main()
