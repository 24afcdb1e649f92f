"""`itm-fast demo`: the paper's loop and this package on real data, and a picture of what SAF attends to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..data import Split, Vocabulary
    from ._comparison import Compared
    from ._picture import Query

HELP = """Evaluate trained models on real pictures inside the package, twice: with the loop of the papers'
own code and with itm-fast. Shows both recall tables, whether they are equal, and the time of each. Takes less
than a minute on two processor cores, after the kernels are compiled once; --full takes two.

  itm-fast demo
  itm-fast demo --full
  itm-fast demo --output pictures --queries "a red apple" "black cat" 12

The pictures are public-domain clip art of the Open Clip Art Library, 36 regions each (a 6 x 6 grid), with one to
three captions each; none of them, and no near copy, was used for training. Chance is what a random order gives.
OUTPUT gets demo.json (all numbers) and attention.png: for a few captions, how much each word counts to the SAF
model, and where in the best-matching picture it looks."""

_SHOWN = ("sgr", "saf", "scan")
IMAGES = 500  # the papers' loop then takes half a minute on two cores
DRAWN = 4  # default queries
FEWEST, MOST = 3, 10  # tokens of a default query
RESULTS = 7
UNKNOWN = " (unknown)"
SUBTITLE = "Orange: how much a word counts. Red: where in the first result it looks."
DRAWN_TITLE = " Random captions of those whose own picture ranks first."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `itm-fast demo`."""
    parser.add_argument(
        "--output", metavar="DIR", default="itm-fast-demo", help="folder for the results (default itm-fast-demo)"
    )
    parser.add_argument(
        "--model",
        choices=(*_SHOWN, "all"),
        default="all",
        help="all (default): SGR, SAF, their mean SGRAF, and SCAN",
    )
    parser.add_argument(
        "--queries",
        nargs="+",
        metavar="QUERY",
        help="captions for the picture: any words in quotes, or numbers of captions of the test split (counted from "
        "0); default: four random captions, first of those whose own picture SAF ranks first",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed that draws the default queries (default 0)")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"use only the first N pictures (default {IMAGES}); with fewer, recall is higher, as is chance",
    )
    parser.add_argument("--full", action="store_true", help="use all 1,000 pictures: four times the work")


def run(args: argparse.Namespace) -> int:
    """Compare, print, draw and write; 1 when the two recall tables differ."""
    from .. import why_not
    from .._files import atomic_write
    from ..data import Vocabulary, open_split
    from ..data.openclipart import CHECKPOINTS, FOLDER, VOCABULARY
    from ..models import load
    from ._comparison import compare, report
    from ._picture import draw

    split = open_split(FOLDER, "test")
    if args.full and args.images is not None:
        raise ValueError("--full uses all pictures, and --images some of them; give one of the two")
    images = len(split.features) if args.full else IMAGES if args.images is None else args.images
    if not 2 <= images <= len(split.features):
        raise ValueError(f"--images must be 2 to {len(split.features)}, got {images}")
    split = split.first(int((split.caption_to_image < images).sum()))
    asked = _asked(args.queries, split)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    vocabulary = Vocabulary.load(VOCABULARY)
    names = _SHOWN if args.model == "all" else (args.model,)
    loaded = {name: load(CHECKPOINTS[name]) for name in dict.fromkeys((*names, "saf"))}
    print(
        f"Scoring {len(split.captions):,} captions with {len(split.features):,} pictures that no model was trained "
        "on: by the papers' loop, and by itm-fast. A wrong answer within 1e-5 of the right one is ranked above it."
    )
    why_not("cpu")  # compiles the kernels if that has not been done, so that no timing includes it
    compared = compare({loaded[name].name: loaded[name].model for name in names}, split, vocabulary)
    print(f"\n{report(compared)}\n")
    width = max(len(row.name) for row in compared)
    for row in compared:
        print(f"{row.name:<{width}}  {row}")

    scores = {row.name: row.scores.fast for row in compared}
    rows = _rows(loaded["saf"].model, split, vocabulary, asked, args.seed, scores.get("SAF"))
    chosen = DRAWN_TITLE if asked is None else ""
    picture = draw("What SAF attends to", SUBTITLE + chosen, rows).to_image()
    with atomic_write(output / "attention.png", "wb") as file:
        picture.save(file, "PNG")
    with atomic_write(output / "demo.json") as file:
        json.dump(_plain(compared), file, indent=1, allow_nan=False)
    print(f"\nWrote {output / 'demo.json'} and {output / 'attention.png'}")
    return 0 if all(row.equal for row in compared) else 1


def _asked(queries: list[str] | None, split: Split) -> list[tuple[str, int | None]] | None:
    """The text of each query and, if it is the number of a caption, that caption's image; None without queries."""
    if queries is None:
        return None
    found: list[tuple[str, int | None]] = []
    for query in queries:
        if not query.isdigit():
            if not query.strip():
                raise ValueError("--queries: an empty query; give words in quotes, or the number of a caption")
            found.append((query, None))
        elif int(query) >= len(split.captions):
            raise ValueError(f"--queries: there is no caption {query}; the captions are 0 to {len(split.captions) - 1}")
        else:
            found.append((split.captions[int(query)], int(split.caption_to_image[int(query)])))
    return found


def _plain(compared: list[Compared]) -> dict[str, Any]:
    """All results and settings, ready for `json.dump`."""
    import platform

    import numpy as np
    import torch

    from .. import __version__
    from ..evaluation.report import backend_names
    from ._comparison import report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = report(compared)
    return {
        **found.to_dict(),
        "compared": [row.to_dict() for row in compared],
        "settings": {
            "itm_fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": str(device),
            "threads": torch.get_num_threads(),
            "backend": backend_names(found.systems),
        },
    }


def _rows(
    model: Any,
    split: Split,
    vocabulary: Vocabulary,
    asked: list[tuple[str, int | None]] | None,
    seed: int,
    score: NDArray[np.float32] | None = None,
) -> list[Query]:
    """The rows of the picture, for the queries given or for random ones; `score`: SAF's [I, T], computed if None."""
    import torch

    from ..evaluation import encode, score_all

    encoded = encode(model, split, vocabulary, progress=False)
    with torch.no_grad():
        image_state = model.scorer.image_state(encoded.image.to(encoded.device))
    if asked is None:
        score = score_all(model.scorer, encoded, progress=False) if score is None else score
        asked = [(split.captions[t], int(split.caption_to_image[t])) for t in _drawn(score, split, vocabulary, seed)]
    return [_query(model, image_state, vocabulary, text, right, split) for text, right in asked]


def _drawn(score: NDArray[np.float32], split: Split, vocabulary: Vocabulary, seed: int) -> list[int]:
    """Numbers of random captions of 3 to 10 known tokens; those whose own picture ranks first come first."""
    import numpy as np

    from ..data import tokenize
    from ..evaluation import ranks

    rank = ranks(score, split.caption_to_image).t2i
    suited = []
    for t in np.random.default_rng(seed).permutation(len(split.captions)).tolist():
        words = tokenize(split.captions[t])
        if FEWEST <= len(words) <= MOST and all(word in vocabulary.word2idx for word in words):
            suited.append(t)
    return sorted(suited, key=lambda t: rank[t] > 0)[:DRAWN]


def _query(model: Any, image_state: Any, vocabulary: Vocabulary, text: str, right: int | None, split: Split) -> Query:
    """One row of the picture: the pictures that SAF ranks highest, and what it attends to in the first."""
    import torch

    from ..data import encode_caption, tokenize
    from ..data.openclipart import thumbnails
    from ._picture import Query

    ids = torch.tensor([encode_caption(text, vocabulary)], device=image_state[0].device)
    known = [word if word in vocabulary.word2idx else word + UNKNOWN for word in tokenize(text)]
    with torch.no_grad():
        words = model.txt_enc(ids, [ids.shape[1]])[0]
        bounds = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        score = model.scorer.score(image_state, words, bounds, model.scorer.caption_state(words, bounds))[:, 0]
        order = score.argsort(descending=True, stable=True).tolist()
        attention = model.scorer.attention(image_state[0][order[0]], words)
    place = None if right is None else order.index(right)
    count = f"{len(order):,}"
    note = f"score of the first of {count} pictures: {attention.score:.2f}"
    if place is not None:
        note = f"its own picture ranks {place + 1} of {count} (framed in green where it is shown); {note}"
    return Query(
        text=text,
        note=note,
        results=thumbnails(order[:RESULTS]),
        right=place if place is not None and place < RESULTS else None,
        words=["whole picture", "<start>", *known, "<end>"],
        weights=attention.weights["nodes"].cpu().numpy(),
        regions=attention.weights["regions"].cpu().numpy(),
    )
