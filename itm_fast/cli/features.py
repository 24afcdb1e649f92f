"""`itm-fast features`: region features of your own pictures, or one array per image, as a split to train on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .._text import several

HELP = """\
Make a split of SCAN's folder from a folder of pictures and a file of captions, for all other commands.

  itm-fast features pictures/train data/mine --split train --captions captions.csv --backbone timm:resnet50.a1_in1k
  itm-fast features pictures/test data/mine --split test --captions captions.json --backbone torchvision:resnet50
  itm-fast features coco data/coco --split train --captions dataset_coco.json \\
    --backbone torchvision:fasterrcnn_resnet50_fpn    # coco holds the folders train2014 and val2014
  itm-fast features coco data/coco --split testall --captions dataset_coco.json \\
    --backbone torchvision:fasterrcnn_resnet50_fpn
  itm-fast features arrays/test data/theirs --split test --captions captions.tsv --from-arrays

The backbone's last feature map is pooled to a grid of regions, and each whole picture is resized to its square. With
one of torchvision's detectors whose name contains rcnn the regions are the boxes that it is surest of, of pictures in
their own shape; a picture in which it proposes no box becomes one region, the whole picture. Take the same backbone and
options for all splits. Pictures are turned upright by their EXIF tag, and laid on white where they are transparent; of
an animation the first picture is taken.

Captions: .csv or .tsv with the columns image and caption; .json with a list of {"image": NAME, "caption": TEXT} or
{"image": NAME, "captions": [TEXT, ...]}, or {NAME: [TEXT, ...]}, or COCO's annotation file; Karpathy's
dataset_coco.json and dataset_flickr30k.json, of which --split chooses the part (train: train and restval, dev: val,
testall: test, else the part of this name: test gives all 5,000 test images of COCO too, where SCAN's test has 1,000);
Flickr30K's results_20130124.token. A name may lack its folder and ending. Pictures without captions are left out.
COCO's ids are kept, for CxC and ECCV metrics. Images are written in the order of their file names, but with Karpathy's
files in the order of that file, since `evaluate --folds 5` (COCO 1K) cuts the images by their order.

With --from-arrays IMAGES holds one .npy or .npz file per image, [regions, features]; the number of regions may differ.
An .npz file's array is called features or x, its boxes are called boxes ([regions, 4]: left, top, right and bottom as
parts of the picture), or bbox in pixels beside image_w and image_h. Pickled objects are never read.

Written: SPLIT_ims.npy, SPLIT_caps.txt, SPLIT_pictures.txt (file names), SPLIT_boxes.npy and, where needed,
SPLIT_caption_to_image.npy, SPLIT_region_lengths.npy, SPLIT_ids.txt and SPLIT_capids.txt (COCO's ids). An interrupted
command goes on when it is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("images", metavar="IMAGES", help="folder of the pictures, or of the arrays")
    parser.add_argument("output", metavar="OUT", help="folder to write to; made if it does not exist")
    parser.add_argument("--captions", required=True, metavar="FILE", help=".csv, .tsv, .json, .token or .token.txt")
    parser.add_argument("--split", default="test", metavar="NAME", help="train, dev, test, ... (default: test)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--backbone", metavar="NAME", help="timm:NAME or torchvision:NAME; pip install '.[features]'")
    source.add_argument("--from-arrays", action="store_true", help="import one array per image")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="state_dict of the backbone (default: downloaded by its package; `random` is for tests)",
    )
    parser.add_argument("--grid", type=int, metavar="N", help="N x N regions of a feature map (default: 6)")
    parser.add_argument("--regions", type=int, metavar="N", help="the most boxes of a detector (default: 36)")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="(shorter) side of resized pictures (default: the backbone's)"
    )
    parser.add_argument("--half", action="store_true", help="store float16: half the size on disk")
    parser.add_argument(
        "--leave-out-broken", action="store_true", help="leave out pictures that cannot be read (default: refuse them)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images computed at once (default: 32); detectors: pictures opened at once, each is computed alone",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")


def run(args: argparse.Namespace) -> int:
    """Write the split; one line on standard output."""
    _check(args)
    from ..features import arrays, captions, pictures, writing

    folder, output, progress = Path(args.images), Path(args.output), not args.no_progress
    writing.require_new(output, args.split)  # before pictures are read
    workers = min(8, os.cpu_count() or 1)
    names = pictures.find(folder, arrays.KINDS if args.from_arrays else pictures.KINDS)
    texts, empty, ordered = captions.read_captions(args.captions, args.split)
    found, lost = captions.match(texts, [arrays.label(name) for name in names], names)
    if len(lost) == len(texts):
        raise ValueError(
            f"no caption fits a file: {args.captions} names {lost[0]!r}, and {folder} holds {names[0]!r}, for example"
        )
    _tell(lost, "of {} named in the captions there is no file in the folder", "images")
    _tell([name for row, name in enumerate(names) if row not in found], "{} without captions left out", "files")
    if empty:
        print(f"itm-fast features: {empty:,} empty captions left out", file=sys.stderr)
    kept = [(names[row], found[row]) for row in (found if ordered else sorted(found))]
    if args.from_arrays:
        images = writing.from_arrays(folder, [name for name, _ in kept], progress=progress)
    else:
        from ..features import backbones, detectors

        network: backbones.Backbone | detectors.Detector
        if detectors.is_detector(args.backbone):
            if args.grid:
                raise ValueError(f"--grid is for feature maps, and {args.backbone} finds boxes; --regions limits them")
            network = detectors.load(args.backbone, args.weights, args.size, args.device, args.regions or 36)
        elif args.regions:
            raise ValueError(f"--regions is for detectors, and {args.backbone} is none; --grid N gives N x N regions")
        else:
            network = backbones.load(args.backbone, args.weights, args.size, args.device)
        wrong, animated = pictures.check(folder, [name for name, _ in kept], progress, workers)
        if wrong and (not args.leave_out_broken or len(wrong) == len(kept)):
            more = f" (and {len(wrong) - 1:,} more: {_some(list(wrong)[1:])})" if len(wrong) > 1 else ""
            raise ValueError(f"{next(iter(wrong.values()))}{more}; mend or remove them, or give --leave-out-broken")
        _tell(list(wrong), "{} that cannot be read left out", "pictures")
        _tell(animated, "of {} the first picture is taken", "animations")
        kept = [(name, own) for name, own in kept if name not in wrong]
        origin = {"backbone": args.backbone, "weights": _weights(args.weights)}
        readable = [name for name, _ in kept]
        if isinstance(network, detectors.Detector):
            images = writing.from_detector(folder, readable, network, origin=origin, workers=workers)
        else:
            images = writing.from_pictures(folder, readable, network, args.grid or 6, origin=origin, workers=workers)
    try:
        writing.write(
            output, args.split, folder, images, [own for _, own in kept], dtype="float16" if args.half else "float32",
            batch_size=args.batch_size, progress=progress,
        )  # fmt: skip
    finally:  # also when interrupted: the next call does not see these pictures again
        _tell(images.without_boxes, "the detector proposes no box in {}, kept as one whole-picture region", "pictures")
    held, (R, F) = several(sum(len(own) for _, own in kept), "caption"), images.shape
    print(f"{output}: {args.split}, {several(len(kept), 'image')} of {R} regions x {F} features, {held}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    for option in ("grid", "regions", "size", "batch_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if not args.split or args.split.startswith(".") or set(args.split) & set("/\\ \t\n"):
        raise ValueError(f"--split must be a name such as train, without spaces, slashes or dots, got {args.split}")
    for option in ("weights", "grid", "regions", "size", "device", "leave_out_broken"):
        if args.from_arrays and getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} is for --backbone, and --from-arrays computes nothing")


def _weights(given: str | None) -> str | list[object]:
    """What tells whether an interrupted command goes on with the same weights."""
    if given in (None, "random"):
        return given or "the package's"
    state = os.stat(given)  # type: ignore[arg-type]
    return [given, state.st_size, state.st_mtime_ns]


def _tell(names: Sequence[str], sentence: str, what: str) -> None:
    """Print a sentence with a number and some names; nothing if there are none."""
    if names:
        line = sentence.format(f"{len(names):,} {what if len(names) > 1 else what.removesuffix('s')}")
        print(f"itm-fast features: {line}: {_some(names)}", file=sys.stderr)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
