"""`itm-fast convert`: SCAN's folder to HDF5, or back."""

from __future__ import annotations

import argparse

from .._text import several

HELP = """\
Turn SCAN's folder of precomputed features into one HDF5 file, or such a file into a folder.

  itm-fast convert data/f30k_precomp f30k.h5
  itm-fast convert f30k.h5 data/f30k_again --split test

The direction follows from SRC and DST. A folder holds, for each split, SPLIT_ims.npy (images x regions x
feature size) and SPLIT_caps.txt (one caption a line); where captions are not in order with the same number
for each image, SPLIT_caption_to_image.npy says which image each belongs to. Region counts, boxes and ids
are carried over. float16 features stay float16, int8 ones become float32, and an image that a folder repeats
for each of its captions is written once.

DST is written completely or not at all: an interrupted conversion leaves nothing under its name, and with --force
the old files. Two conversions cannot write to DST at once. Free disk space is checked before anything is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="the folder, or the .h5 or .hdf5 file, to read")
    parser.add_argument(
        "destination", metavar="DST", help="what to write: a .h5 or .hdf5 file, or a folder if SRC is a file"
    )
    parser.add_argument(
        "--split", nargs="+", metavar="NAME", help="convert only these splits, such as train (default: all)"
    )
    parser.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="for a folder with as many rows of features as captions where the rows do not repeat each image five "
        "times: 1 if every row is a different image, 5 to use every fifth row, as the published code does",
    )
    parser.add_argument(
        "--mask-zero-regions",
        action="store_true",
        help="write region counts that leave out the all-zero regions at the end of each image",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite DST: a file is replaced with all its splits, in a folder only the splits that are converted",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on a terminal; one line per split on standard output."""
    from tqdm import tqdm

    from ..data import convert, open_split, split_names

    with tqdm(desc="images", unit=" images", leave=False, disable=None) as bar:
        convert(
            args.source,
            args.destination,
            splits=args.split,
            force=args.force,
            captions_per_image=args.captions_per_image,
            mask_zero_regions=args.mask_zero_regions,
            images_written=bar.update,
        )
    for name in args.split or split_names(args.destination):
        split = open_split(args.destination, name)
        images, captions = several(len(split.features), "image"), several(len(split.captions), "caption")
        print(f"{args.destination}: {name}, {images}, {captions}")
    return 0
