"""`itm-fast gallery`: encode the images of a data set into a folder that `itm-fast search` searches."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._text import several

HELP = """\
Encode the images of a data set by a checkpoint into a folder, which `itm-fast search` then searches by captions.

  itm-fast gallery --checkpoint SCAN.pth.tar --data data/f30k_precomp --split test --gallery f30k
  itm-fast gallery --checkpoint SGR.pth.tar --first SCAN.pth.tar --data coco.h5 --split testall --gallery coco --half
  itm-fast gallery ... --names names.txt --pictures flickr30k-images      (file names, for `itm-fast search --html`)

An interrupted command goes on when it is given again. Given again for a finished gallery, it checks the encoded images
and adds what is new: names, the place of the pictures, the vectors of another --first. The data may then be deleted.
Captions of the data are used for one thing: a sample of 100 is kept, on which the recall of approximate searches is
measured. An image takes regions x D x 4 bytes (36 regions, D 1024: 147 KB), half of that with --half."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the model that encodes and will score")
    parser.add_argument(
        "--data", required=True, metavar="DIR_OR_H5", help="SCAN's folder of .npy and .txt files, or an HDF5 file"
    )
    parser.add_argument("--split", default="test", help="dev, test, testall, ... (default: test)")
    parser.add_argument("--gallery", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--first",
        metavar="FILE",
        help="a SCAN or DualEncoder checkpoint, trained on the same features, for approximate searches of other models",
    )
    parser.add_argument("--half", action="store_true", help="keep half precision: half the size, scores to 3 digits")
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="a name for each image, one a line (default: the first words of the lines of SPLIT_pictures.txt beside "
        "the features, else the image ids)",
    )
    parser.add_argument(
        "--pictures", metavar="DIR", help="the folder with the pictures of these names, for --html of itm-fast search"
    )
    parser.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="1 or 5, for folders with as many rows of features as captions; see `itm-fast convert --help`",
    )
    parser.add_argument(
        "--mask-zero-regions",
        action="store_true",
        help="if the data have no region counts, leave out the all-zero regions at the end of each image",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images encoded at once (default 128)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")


def run(args: argparse.Namespace) -> int:
    """Build the gallery; one line on standard output."""
    from ..data import open_split
    from ..data.openclipart import FOLDER
    from ..data.texts import text_lines
    from ..gallery import Gallery
    from ..gallery.files import ABOUT
    from ..models import load
    from ._pictures import listed_names

    if args.pictures and not Path(args.pictures).is_dir():
        raise NotADirectoryError(f"--pictures {args.pictures} is not a folder")
    split = open_split(
        args.data,
        args.split,
        captions_per_image=args.captions_per_image,
        mask_zero_regions=args.mask_zero_regions,
    )
    names: list[str] | None = None  # those of a finished gallery stay
    if args.names:
        names = [line.strip() for line in text_lines(args.names)]
    elif not (Path(args.gallery) / ABOUT).exists():
        listed = listed_names(args.data, args.split, split)
        names = listed and [name or str(row) for row, name in enumerate(listed)]
    if args.pictures is None and Path(args.data).resolve() == FOLDER:
        args.pictures = FOLDER  # its thumbnails
    gallery = Gallery.build(
        load(args.checkpoint, args.device),
        split,
        args.gallery,
        names=names,
        pictures=args.pictures,
        dtype="float16" if args.half else "float32",
        first=load(args.first, args.device) if args.first else None,
        batch_size=args.batch_size,
        progress=not args.no_progress,
    )
    print(f"{args.gallery}: {several(len(gallery), 'image')} encoded by {gallery.model.name}, {gallery.about.dtype}")
    return 0
