"""Run published repositories' own code beside the same code after `itm_fast.patch`.

    python benchmarks/repositories.py owner/name=FOLDER ... [--name NAME]

For each repository, a checkout in FOLDER: what `patch` replaces; the gradients of its own scorer, and five training
steps with it and, where it takes scores, its own loss, from one random state; its checkpoint loaded into the library's
model and back; and the seconds of its own scoring loop before and after. Modules that a repository imports for other
purposes (plots, data) and that are not installed here are replaced by empty ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

if __name__ == "__main__":  # from a bare checkout, `benchmarks` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itm_fast
from benchmarks.harness import alternate, largest_difference, progress, write
from benchmarks.machine import environment
from itm_fast.ops import hardest_negative_loss
from itm_fast.patching._families import CLASSES, Family, families
from itm_fast.patching._proof import in_float64, published, with_gradients

SCAN = {
    "raw_feature_norm": "clipped_l2norm", "agg_func": "LogSumExp", "lambda_softmax": 9.0, "lambda_lse": 6.0,
    "cross_attn": "t2i",
}  # fmt: skip
NAAF = {"lambda_softmax": 20.0, "thres": 0.0, "thres_safe": 0.1, "alpha": 2.0}
TWO_METHODS = ("SCAN",)  # classes of which two methods score
LEFT_OUT = (  # modes that no published script has, and one that needs an older NumPy
    "unit queries", "sparse", *(f"{a}Coding {b}Pooling" for a in ("VHA", "THA", "VSA") for b in ("Mean", "Max", "Sum")),
)  # fmt: skip
SIZES = (32, 160, 1024, 256)  # images, captions, D and S of the timed scoring
SLOW, SLOW_CAPTIONS = ("SCAN", "CMCAN"), 32  # classes whose loops are slow, and captions of theirs
EMPTY = (
    "imageio", "matplotlib", "matplotlib.pyplot", "nltk", "ot", "pandas", "prefetch_generator", "pycocotools",
    "pycocotools.coco", "scipy", "scipy.io", "scipy.optimize", "scipy.spatial", "scipy.stats", "sklearn",
    "sklearn.cluster", "sklearn.metrics", "sklearn.metrics.pairwise", "sklearn.mixture", "tensorboard_logger",
    "torchtext", "torchvision", "torchvision.models", "torchvision.transforms", "tqdm", "transformers", "turtle",
)  # fmt: skip


class Contender(NamedTuple):
    """One pair scorer of a repository.

    Attributes:
        title: what the table calls it.
        module: defines it.
        name: of its class or function in the module.
        known: the class's family; None for a function.
        mode: what the class can be.
        options: the function's `opt`.
        square: caption t must be that of image t.
    """

    title: str
    module: ModuleType
    name: str
    known: Family | None = None
    mode: str = ""
    options: dict[str, Any] | None = None
    square: bool = False

    def make(self, D: int, S: int) -> Any:
        """A new scorer; that of a function has no parameters."""
        return None if self.known is None else self.known.make(getattr(self.module, self.name), self.mode, D, S)

    def parts(self, scorer: Any) -> dict[str, nn.Module]:
        """The scorer's modules."""
        return {} if self.known is None else self.known.parts(scorer)

    def arguments(self, *batch: Any) -> tuple[Any, ...]:
        """What the scorer is called with for images, captions and lengths."""
        return (
            (*batch, Namespace(**(self.options or {}))) if self.known is None else self.known.example(self.mode, *batch)
        )

    def score(self) -> Callable[..., Tensor]:
        """The code that scores now, (scorer, *arguments) -> scores: a change of it by `patch` later has no effect."""
        if self.known is None:
            function = getattr(self.module, self.name)
            return lambda scorer, *arguments: function(*arguments)
        method = getattr(getattr(self.module, self.name), self.known.method)
        return lambda scorer, *arguments: _scores(method(scorer, *arguments))


def _scores(result: Any) -> Tensor:
    """The scores, which some forks return with other values behind them, and IMRAM as a list of terms."""
    return result[0] if isinstance(result, tuple) else sum(result) if isinstance(result, list) else result


def contenders(modules: Sequence[ModuleType]) -> list[Contender]:
    """The pair scorers that these modules define."""
    found = []
    for module in modules:
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        for name in sorted(own.intersection(CLASSES)):
            found += [
                Contender(
                    f"{known.method} {mode}" if known.name in TWO_METHODS else mode or name, module, name, known, mode
                )
                for known in families(getattr(module, name))
                if tuple(signature(getattr(getattr(module, name), known.method)).parameters)[1:] == known.takes
                for mode in known.modes
                if mode not in LEFT_OUT
            ]
        if "xattn_score_t2i" in own:
            found.append(Contender("SCAN t2i", module, "xattn_score_t2i", options=SCAN))
        if "xattn_score_test" in own:
            found.append(Contender("NAAF, evaluation", module, "xattn_score_test", options=NAAF))
            found.append(Contender("NAAF, training", module, "xattn_score", options=NAAF, square=True))
        elif "xattn_score" in own:
            for kind in ("equal", "prob"):
                options = {"lambda_softmax": 20.0, "focal_type": kind}
                found.append(Contender(f"BFAN {kind}", module, "xattn_score", options=options))
    return found


def batch(images: int, captions: int, D: int) -> tuple[Tensor, Tensor, list[int]]:
    """Unit regions [images, 36, D] and words [captions, 20, D], and 4 to 20 words a caption, descending.

    As many captions as images match them, caption t image t.
    """
    image, caption = (torch.randn(n, w, D) for n, w in ((images, 36), (captions, 20)))
    if images == captions:
        caption = image[:, :20] + 0.5 * caption
    image, caption = (nn.functional.normalize(x, dim=2) for x in (image, caption))
    return image, caption, sorted((4 + 17 * n // captions for n in range(captions)), reverse=True)


def _training(one: Contender) -> tuple[Any, tuple[Any, ...], list[Tensor]]:
    """A new scorer in training mode, its arguments for a batch, and what it trains: images, captions, parameters."""
    torch.manual_seed(0)
    scorer = one.make(32, 16)
    _mode(one, scorer, True)
    pairs = 24 if one.square else 8  # NAAF's thresholds move from 200 words on
    image, caption, lengths = batch(pairs, pairs, 32)
    parameters = [x for part in one.parts(scorer).values() for x in part.parameters()]
    inputs = [image.requires_grad_(), caption.requires_grad_()]
    return scorer, one.arguments(image, caption, lengths), [*inputs, *parameters]


def _mode(one: Contender, scorer: Any, training: bool) -> None:
    for module in [scorer] if isinstance(scorer, nn.Module) else one.parts(scorer).values():
        module.train(training)


def gradients(one: Contender) -> Tensor:
    """The gradients of images, captions and parameters, as one vector, with dropout, in float64."""
    scorer, given, parameters = published(lambda: _training(one))
    score = one.score()
    _, *found = with_gradients(lambda: published(lambda: score(scorer, *given)), parameters)
    return torch.cat([gradient.flatten() for gradient in found])


def five_losses(one: Contender) -> list[float]:
    """Losses of five steps of training of a scorer, images and captions, with dropout, in float64."""
    scorer, given, parameters = published(lambda: _training(one))
    score = one.score()
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    own = _own_loss(one)

    def loss() -> Tensor:
        if own is not None and "im" in signature(own.forward).parameters:  # it scores
            return own(*given[:3])
        scores = score(scorer, *given)
        if own is None:
            return hardest_negative_loss(scores, margin=0.2)
        return own(scores, *[len(scores)] * (len(signature(own.forward).parameters) - 1))

    found = []
    for _ in range(5):
        optimizer.zero_grad()
        value = published(loss)
        value.backward()
        optimizer.step()  # of torch, which would believe the GPU that `published` shows
        found.append(value.item())
    return found


def _own_loss(one: Contender) -> Any:
    """The loss of the module that defines the scorer; None if it has none, or none of scores or embeddings alone."""
    cls = getattr(one.module, "ContrastiveLoss", None)
    if cls is None:
        return None
    options = [Namespace(**(one.options or {}), margin=0.2, max_violation=True)] * ("opt" in signature(cls).parameters)
    known = [["scores"], ["sims"], ["scores", "length"], ["im", "s", "s_l"]]
    if list(signature(cls.forward).parameters)[1:] not in known:
        return None
    return cls(*options, margin=0.2, max_violation=True)


def checkpoint_both_ways(one: Contender) -> bool | None:
    """Whether a state_dict loads into the library's scorer and back, strictly; None where there is none."""
    scorer, given, _ = _training(one)
    parts = one.parts(scorer)
    theirs = {
        name: {f"{name}.".lstrip(".") + key: x for key, x in part.state_dict().items()} for name, part in parts.items()
    }
    if one.known is None or not any(theirs.values()):
        return None
    named = dict(zip(one.known.takes, given, strict=True))
    ours = one.known.ours(scorer, one.known.options(scorer, named))
    ours.load_state_dict({key: x for state in theirs.values() for key, x in state.items()})
    found = ours.state_dict()
    for name, part in parts.items():
        part.load_state_dict({key.removeprefix(f"{name}."): found[key] for key in theirs[name]})
    return set(found) == {key for state in theirs.values() for key in state}


def measure(one: Contender, rounds: int) -> dict[str, Any]:
    """One scorer before and after `patch`: gradients, losses, scores, checkpoint, seconds."""
    with in_float64():
        own_gradients, own_losses = gradients(one), five_losses(one)
    own = one.score()
    itm_fast.patch(one.module)
    patched = one.score()
    with in_float64():
        found, losses = gradients(one), five_losses(one)
        both_ways = published(lambda: checkpoint_both_ways(one))
    torch.manual_seed(0)
    images, captions, D, S = SIZES
    scorer = published(lambda: one.make(D, S))
    _mode(one, scorer, False)
    captions = images if one.square else min(captions, SLOW_CAPTIONS) if one.name in SLOW else captions
    given = batch(images, captions, D)
    arguments = []
    for _ in range(2):  # NAAF's thresholds move in the options of each
        torch.manual_seed(1)
        arguments.append(one.arguments(*given))
    with torch.no_grad():
        calls = {
            "own": lambda: published(lambda: own(scorer, *arguments[0])),
            "patched": lambda: patched(scorer, *arguments[1]),
        }
        apart = largest_difference(*(call() for call in calls.values()))
        times = alternate(calls, rounds)
    itm_fast.unpatch(one.module)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        "mode": one.title,
        "captions": captions,
        "difference_of_gradients": float((found - own_gradients).norm() / own_gradients.norm()),
        "losses": own_losses,
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
        "checkpoint_both_ways": both_ways,
        "largest_difference_of_scores": apart,
        "seconds_own": seconds["own"],
        "seconds_patched": seconds["patched"],
        "times_faster": seconds["own"] / seconds["patched"],
    }


def repository(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """What `patch` does to one repository, and its scorers before and after."""
    modules, path = dict(sys.modules), list(sys.path)
    try:
        report = itm_fast.patch(folder)
        itm_fast.unpatch()
        found = contenders([module for key, module in list(sys.modules.items()) if key not in modules])
        rows = [measure(one, rounds) for one in found]
    finally:
        sys.path[:] = path
        own = {file.stem for file in folder.iterdir()}
        for key in set(sys.modules) - set(modules):
            if key.partition(".")[0] in own:
                del sys.modules[key]
    return {"repository": name, "patch": [vars(row) for row in report], "scorers": rows}


def table(result: dict) -> str:
    """Markdown: a row per repository and scorer."""
    e, (images, captions, D, S) = result["environment"], result["sizes"]
    fewer = [row["mode"] for one in result["results"] for row in one["scorers"] if row["captions"] < captions]
    fewer_captions = f" ({', '.join(dict.fromkeys(fewer))}: {SLOW_CAPTIONS})" if fewer else ""
    lines = [
        f"Repositories' own code before and after `itm_fast.patch`, by `benchmarks/repositories.py` on {e['device']}, "
        f"{e['threads']} threads, torch {e['torch']}, {e['date']}, commit {e['commit']}: float32 scores of {images} "
        f"images x {captions} captions{fewer_captions}, D {D}, S {S}; gradients, of their norm, and losses of five "
        "training steps in float64. Lines of the repository that change: none, and one where it is started.\n",
        "| repository | scorer | scores differ by | gradients by | losses by | checkpoint both ways | x its loop | "
        "refused |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for one in result["results"]:
        kept = ", ".join(row["name"] for row in one["patch"] if row["outcome"] == "refused") or ""
        for row in one["scorers"]:
            both = {True: "yes", False: "no", None: ""}[row["checkpoint_both_ways"]]
            lines.append(
                f"| {one['repository']} | {row['mode']} | {row['largest_difference_of_scores']:.0e} | "
                f"{row['difference_of_gradients']:.0e} | {row['largest_difference_of_losses']:.0e} | {both} | "
                f"{row['times_faster']:.1f} | {kept} |"
            )
    lines.append("\nWhy the refused stay as they are:\n")
    for one in result["results"]:
        for row in one["patch"]:
            if row["outcome"] == "refused":
                lines.append(f"- {one['repository']}, `{row['name']}` ({row['where']}): {row['detail']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="owner/name=FOLDER")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of timing (default: %(default)s)")
    parser.add_argument("--name", default="repositories", help="of the result file (default: %(default)s)")
    opt = parser.parse_args(arguments)
    # turtle, which CHAN imports by mistake, needs a display.
    absent = {name for name in EMPTY if "." not in name and (name == "turtle" or find_spec(name) is None)}
    for name in EMPTY:
        if name.partition(".")[0] in absent:
            sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))
    results = []
    for checkout in opt.checkouts:
        name, _, folder = checkout.partition("=")
        if not folder or not Path(folder).is_dir():
            parser.error(f"{checkout!r} must be owner/name=FOLDER, and the folder exist")
        progress(name)
        results.append(repository(name, Path(folder), opt.rounds))
    write(opt.name, {"environment": environment(), "sizes": SIZES, "results": results})


if __name__ == "__main__":
    main()
