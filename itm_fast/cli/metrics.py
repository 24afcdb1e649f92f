"""`itm-fast metrics`: recalls of a score matrix that someone already has."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

HELP = """\
Rate a score matrix, whatever model computed it: recalls, median and mean rank of both directions, chance, ties.

  itm-fast metrics scores.npy --captions-to-images owners.txt
  itm-fast metrics scores.npy --captions-per-image 5 --folds 5 --at 1 5 10 50 100 --output results

SCORES.npy holds floating-point numbers [images, captions], higher is better: what `numpy.save` writes.

FILE says which image each caption describes. Images count from 0. A caption may have several right images:
  .npy   integers [captions], or booleans [images, captions] that are true where image and caption are right
  .json  a list with a number, or a list of numbers, for each caption
  else   text: a line for each caption with one or more numbers, separated by spaces or commas
A query's rank is that of its best right item; its other right items do not lower it. An image without captions is no
query, but stays in the pool as a wrong answer. With COCO's ids of the 5K test set, CxC and ECCV Caption metrics are
reported too (pip install '.[eccv]'), and with --pmrp Plausible Match R-Precision.

--output DIR gets the files of `itm-fast evaluate --output`, so that `itm-fast compare` can read them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from ..evaluation import TIES

    parser.add_argument("scores", metavar="SCORES.npy", help="the score matrix [images, captions]")
    right = parser.add_mutually_exclusive_group(required=True)
    right.add_argument("--captions-to-images", metavar="FILE", help="the right images of each caption: see FILE above")
    right.add_argument(
        "--captions-per-image", type=int, metavar="N", help="captions 0 to N - 1 describe image 0, and so on"
    )
    parser.add_argument("--at", nargs="+", type=int, default=[], metavar="K", help="also report R@K for these K")
    parser.add_argument("--folds", type=int, metavar="N", help="also average over N parts of the images; 5 for COCO 1K")
    parser.add_argument(
        "--ties", choices=TIES, default=TIES[0], help="where ties are ranked: see `itm-fast evaluate --help`"
    )
    parser.add_argument("--name", help="row title (default: the name of SCORES.npy)")
    parser.add_argument(
        "--captions", metavar="FILE", help="the captions' texts, one a line, for the lists of queries in report.html"
    )
    parser.add_argument(
        "--image-ids", metavar="FILE", help="COCO's ids of the images, .npy or one a line, for CxC and ECCV metrics"
    )
    parser.add_argument("--caption-ids", metavar="FILE", help="COCO's ids of the captions")
    parser.add_argument(
        "--pmrp",
        metavar="DIR",
        help="also report PMRP: the folder of pm_image_to_caption.json and pm_caption_to_image.json, which the "
        "eccv-caption project (github.com/naver-ai/eccv-caption) offers for download",
    )
    parser.add_argument("--output", metavar="DIR", help="write report.html, results.* and ranks.npz here")


def run(args: argparse.Namespace) -> int:
    """Rate the matrix; the tables go to standard output."""
    import numpy as np

    from .._lock import locked_folder
    from ..evaluation.html_report import WORST
    from ..evaluation.many_right import pairs_of, read_right_pairs
    from ..evaluation.rating import open_scores, rate, read_ids

    if args.captions and not args.output:
        raise ValueError("--captions are for report.html, which --output DIR writes; give that as well")
    score = open_scores(args.scores)
    images, captions = score.shape
    each = args.captions_per_image
    if args.captions_to_images:
        pairs = read_right_pairs(args.captions_to_images, images, captions)
    elif each < 1 or images * each != captions:
        raise ValueError(
            f"--captions-per-image {each} does not fit {args.scores}, which has {images:,} images (rows) and "
            f"{captions:,} captions (columns)"
        )
    else:
        pairs = pairs_of(np.arange(captions) // each)
    texts = None
    if args.captions:
        texts = Path(args.captions).read_text(encoding="utf-8-sig").splitlines()
    ids = [None if path is None else read_ids(path) for path in (args.image_ids, args.caption_ids)]
    with locked_folder(Path(args.output), "results") if args.output else contextlib.nullcontext():
        report = rate(
            score, pairs, name=args.name or Path(args.scores).stem, cutoffs=args.at, folds=args.folds, ties=args.ties,
            captions=texts, image_ids=ids[0], caption_ids=ids[1], pmrp=args.pmrp, worst=WORST if args.output else 0,
        )  # fmt: skip
        print(report)
        if report.relevance_missing and any(one is not None for one in ids):
            print(report.relevance_missing)
        if args.output:
            print("written: " + ", ".join(map(str, report.save(args.output))))
    return 0
