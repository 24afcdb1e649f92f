"""`itm-fast attend`: a figure of what a model attends to in an image and its captions."""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..data import Split
    from ..nn import Attention
    from ._picture import Query

HELP = """Draw what a model attends to in one image, for each of some captions: words shaded by how much they count,
and where in the picture each word looks.

  itm-fast attend --checkpoint SAF.pth.tar --data data/f30k_precomp --image 12
  itm-fast attend --checkpoint SAF.pth.tar --data data/f30k_precomp --image 12 "a red kite" --pictures flickr30k-images
  itm-fast attend --checkpoint SCAN.pth.tar --data f30k.h5 --split dev --image 3 --output figure.svg

Without captions the image's own are drawn. Regions lie over the picture by the boxes of the HDF5 file, or by
SPLIT_boxes.npy beside the features ([images, regions, 4]: left, top, right and bottom as parts of the picture's width
and height); without boxes they are drawn as a square grid, row by row. `itm_fast.attention` gives the same weights
as numbers."""

_WHOLE = "whole picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("captions", nargs="*", metavar="CAPTION", help="in quotes (default: the image's own)")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the model")
    parser.add_argument("--data", required=True, metavar="PATH", help="SCAN's folder, or an HDF5 file of `convert`")
    parser.add_argument("--split", default="test", metavar="NAME", help="split of the data (default: test)")
    parser.add_argument("--image", type=int, required=True, metavar="N", help="number of the image, counted from 0")
    parser.add_argument(
        "--vocab",
        metavar="JSON",
        help="the model's vocabulary; default: the one beside the checkpoint, or where it was trained",
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="folder of the pictures; file names are in SPLIT_pictures.txt beside the features, or end in image ids",
    )
    parser.add_argument(
        "--output", metavar="FILE", default="attention.png", help=".png or .svg (default attention.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw and write."""
    output = Path(args.output)
    if output.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--output must end in .png or .svg, got {args.output}")
    from .._files import atomic_write, require_place

    require_place(output, "--output")
    from PIL import Image

    from ..data import open_split
    from ..evaluation.boxes import warn_of_boxes
    from ..models import attention, load
    from ._picture import blank, draw
    from ._pictures import pictures_of

    split = open_split(args.data, args.split)
    if not 0 <= args.image < len(split.features):
        raise ValueError(f"--image: there is no image {args.image}; the images are 0 to {len(split.features) - 1}")
    loaded = load(args.checkpoint, vocab=args.vocab)
    if loaded.vocab is None:
        raise FileNotFoundError(f"no vocabulary found beside {args.checkpoint}; give it with --vocab FILE.json")
    own = [split.captions[t] for t in (split.caption_to_image == args.image).nonzero()[0]]
    captions = args.captions or own
    if not captions:
        raise ValueError(f"image {args.image} has no captions; give one in quotes")
    features = split.features[args.image : args.image + 1][0]
    if split.region_lengths is not None:
        features = features[: int(split.region_lengths[args.image])]
    boxes = _boxes(args, split, len(features))
    warn_of_boxes(loaded.model, split.name, boxes)
    pictures = pictures_of(args.pictures, args.data, args.split, split)
    found = pictures(args.image) if pictures else None
    picture = Image.open(io.BytesIO(found)) if found else blank()
    rows = []
    for caption in captions:
        weights = attention(loaded.model, features, caption, loaded.vocab, boxes)
        if not math.isfinite(weights.score):
            raise ValueError(
                f"the score of image {args.image} and {caption!r} is {weights.score}; check that image's features and "
                "the checkpoint's weights for NaN"
            )
        rows.append(_row(weights, caption, picture, boxes))
    subtitle = "Orange: how much a word counts. Red: where in the picture it looks."
    drawing = draw(f"What {loaded.name} attends to in image {args.image}", subtitle, rows)
    if output.suffix.lower() == ".svg":
        with atomic_write(output) as file:
            file.write(drawing.to_svg())
    else:
        with atomic_write(output, "wb") as file:
            drawing.to_image().save(file, "PNG")
    print(f"written: {output}")
    return 0


def _boxes(args: argparse.Namespace, split: Split, regions: int) -> NDArray[np.float32] | None:
    """The image's boxes [R, 4] in the split, or else beside an HDF5 file; None if there are none."""
    import numpy as np

    from ..data.boxes import check_boxes

    if split.boxes is not None:
        name, found = split.name, split.boxes[args.image : args.image + 1]
    else:
        data = Path(args.data)
        path = (data if data.is_dir() else data.parent) / f"{args.split}_boxes.npy"
        if not path.is_file():
            return None
        boxes = np.load(path, mmap_mode="r", allow_pickle=False)
        if boxes.ndim != 3 or boxes.shape[2] != 4 or len(boxes) <= args.image or boxes.shape[1] < regions:
            raise ValueError(f"{path} must be [images, regions, 4] with {regions} regions, got {list(boxes.shape)}")
        name, found = str(path), np.array(boxes[args.image : args.image + 1], np.float32)
    check_boxes(name, found[:, :regions], first=args.image)
    return found[0, :regions]


def _row(found: Attention, caption: str, picture, boxes: NDArray[np.float32] | None) -> Query:
    """A row of the figure from the weights that the model has."""
    from ._picture import Query

    weights = {name: each.cpu().float().numpy() for name, each in found.weights.items()}
    regions = weights["regions"] if "regions" in weights else weights["words"].T
    words, shares = list(found.tokens), True
    if "nodes" in weights:  # SGR, SAF
        words, counts = [_WHOLE, *words], weights["nodes"]
    elif "word_pool" in weights:  # SHAN
        counts = weights["word_pool"]
    elif "query_shares" in weights and len(weights["query_shares"]) == len(words):  # RCAR t2i
        counts = weights["query_shares"]
    elif "words" in weights:  # of every region's attention, what this word gets on average
        counts = weights["words"].mean(0)
    elif "cosines" in weights:  # SCAN t2i
        counts, shares = weights["cosines"], False
    else:
        counts = regions.max(1)
    note = f"score {found.score:.3f}" + ("" if shares else "; below a word: its cosine with what it attends to")
    return Query(caption, note, [picture], None, words, counts, regions, boxes, "the image", shares)
