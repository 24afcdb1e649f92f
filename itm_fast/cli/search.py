"""`itm-fast search`: captions in, the images of a gallery that score best out."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from .._names import BACKENDS

HELP = """\
Find the images of a gallery that score best with captions. `itm-fast gallery` makes one.

  itm-fast search --checkpoint SCAN.pth.tar --gallery f30k "a red kite over the sea"
  itm-fast search --checkpoint SCAN.pth.tar --gallery f30k -k 5 --json - < captions.txt
  itm-fast search --checkpoint SGR.pth.tar --gallery coco --candidates 200 --first SCAN.pth.tar --html a.html "a dog"

The model scores every image of the gallery. In a large gallery that takes long, and --candidates N lets it score only
N images per caption: those whose mean region is closest to the caption's mean word, by the gallery's own SCAN or
DualEncoder checkpoint or by that of --first. The answer is then called approximate, and says how many of the images of
exact search it finds: this is measured on the first such search, which therefore scores every image with 100 sample
captions of the gallery's data, and kept in the gallery. It is not the recall of the model; `itm-fast evaluate` measures
that, with every pair scored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "captions",
        nargs="*",
        metavar="CAPTION",
        help="captions, each in quotes; - reads them from standard input, one a line",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the model that the gallery was built with")
    parser.add_argument("--gallery", required=True, metavar="DIR", help="the gallery")
    parser.add_argument(
        "--vocab",
        metavar="JSON",
        help="the model's vocabulary; default: the one beside the checkpoint, or where it was trained",
    )
    parser.add_argument("-k", type=int, default=10, metavar="K", help="images per caption (default: 10)")
    parser.add_argument("--candidates", type=int, metavar="N", help="approximate: score only N images per caption")
    parser.add_argument(
        "--first",
        metavar="FILE",
        help="with --candidates: the SCAN or DualEncoder checkpoint that chooses them; the gallery was built with it; "
        "default: the model itself if it is one of these",
    )
    parser.add_argument(
        "--first-vocab", metavar="JSON", help="the vocabulary of --first; default: the one beside it, as for --vocab"
    )
    compute = parser.add_argument_group("speed and memory")
    compute.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    compute.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        metavar="NAME",
        help="auto, torch, reference, ...; `itm-fast doctor` lists them (default: auto)",
    )
    compute.add_argument(
        "--memory-gb", type=float, metavar="GB", help="memory budget for scoring, as for itm-fast evaluate"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--html", metavar="PAGE", help="also write a page with the pictures; it needs no other file")
    output.add_argument(
        "--pictures",
        metavar="DIR",
        help="with --html: the folder of the pictures (default: that given to itm-fast gallery)",
    )
    output.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")


def run(args: argparse.Namespace) -> int:
    """Search; results go to standard output."""
    captions = _captions(args.captions)
    if args.first and args.candidates is None:
        raise ValueError("--first chooses the candidates of an approximate search; say how many with --candidates N")
    if args.first_vocab and not args.first:
        raise ValueError("--first-vocab is the vocabulary of --first; name its checkpoint with --first FILE")
    if args.pictures and not args.html:
        raise ValueError("--pictures are for a page; name it with --html PAGE")
    if args.pictures and not Path(args.pictures).is_dir():
        raise NotADirectoryError(f"--pictures {args.pictures} is not a folder")
    from .._files import atomic_write, require_place

    if args.html:
        require_place(args.html, "--html")
    from .._backends import use_backend
    from ..gallery import Gallery
    from ..models import load

    model = load(args.checkpoint, args.device, vocab=args.vocab)
    first = load(args.first, args.device, vocab=args.first_vocab) if args.first else None
    gallery = Gallery.open(args.gallery, model)
    with use_backend(args.backend) if args.backend != "auto" else contextlib.nullcontext():
        found = gallery.search(
            captions,
            args.k,
            candidates=args.candidates,
            first=first,
            memory_gb=args.memory_gb,
            progress=not args.no_progress,
        )
    print(
        json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if args.json else f"{found} ({found.seconds:.2f} s)"
    )
    if args.html:
        from ._page import SIDE, page
        from ._pictures import pictures_by_name

        folder = args.pictures or gallery.about.pictures
        if folder and not Path(folder).is_dir():
            print(f"itm-fast search: {folder} is gone; --pictures DIR says where its pictures are", file=sys.stderr)
            folder = None
        with atomic_write(args.html) as file:
            file.write(page(found, pictures_by_name(folder, SIDE) if folder else None))
        print(f"written: {args.html}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _captions(words: list[str]) -> list[str]:
    """The captions given, or those of standard input."""
    if words == ["-"]:
        from ..data.texts import caption_text

        lines = enumerate(sys.stdin.buffer, 1)
        texts = (caption_text(line.strip(), f"line {row} of standard input").strip() for row, line in lines)
        words = [text for text in texts if text]
        if not words:
            raise ValueError("standard input has no caption; give one a line")
    elif "-" in words:
        raise ValueError("- reads all captions from standard input; give it alone, or give captions without it")
    if not words:
        raise ValueError(
            'give a caption in quotes, such as "a red kite over the sea", or - to read them from standard input'
        )
    return words
