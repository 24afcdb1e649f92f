"""`itm-fast train`: the published recipes on precomputed features."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from .. import _torchrun
from .._names import BACKENDS
from .._text import several
from ..models._catalogue import CATALOGUE, RECIPES, Entry
from ..models._options import ENCODERS, TRAINING, Option
from ..models._recognised import check, title
from ..training.recipe import options


def _models() -> str:
    """A line for each model: its paper, and how much of it is published."""
    lines = [
        (row.name, row.known if row.paper == "none" else f"{row.paper}: {row.known}") for row in CATALOGUE.values()
    ]
    return "\n".join(f"  {name:<6} {text}" for name, text in lines)


def _schedules() -> str:
    """A line for each recipe: num_epochs/lr_update of the models, and learning rates that differ from the usual one."""
    lines = []
    for recipe, usual in RECIPES.items():
        schedules: dict[str, list[str]] = {}
        rates: dict[str, list[str]] = {}
        for row in CATALOGUE.values():
            found = row.published(recipe, None)
            if any(found[name] != value for name, value in usual.items()):
                schedules.setdefault(f"{found['num_epochs']}/{found['lr_update']}", []).append(row.name)
            if found["learning_rate"] != TRAINING["learning_rate"].default:
                rates.setdefault(f"{found['learning_rate']:g}", []).append(row.name)
        groups = [f"{', '.join(names)} {schedule}" for schedule, names in schedules.items()]
        groups.append(f"all others {usual['num_epochs']}/{usual['lr_update']}")
        groups += [f"{', '.join(names)} with learning rate {rate}" for rate, names in rates.items()]
        lines.append(f"  {recipe:<6} {'; '.join(groups)}")
    return "\n".join(lines)


HELP = f"""Train one model on precomputed features with its published recipe.

{_models()}

  itm-fast train --model sgr --data data/f30k_precomp --output runs/f30k_sgr
  itm-fast train --model scan --direction i2t --recipe coco --data data/coco_precomp --output runs/coco_i2t
  itm-fast train --model shan --word-vectors glove.840B.300d.txt --data data/f30k_precomp --output runs/f30k_shan
  torchrun --nproc-per-node 4 -m itm_fast train --model sgr --data data/f30k_precomp --output runs/f30k_sgr

DATA is SCAN's folder (train_ims.npy, train_caps.txt, dev_ims.npy, dev_caps.txt) or an HDF5 file that
`itm-fast convert` wrote. OUTPUT gets model_best.pth.tar (the epoch with the highest sum of dev recalls) and
checkpoint.pth.tar (the last epoch), both readable by the published code, and the vocabulary, log.csv and resume.pt.
Ctrl-C finishes the current step and saves; the same command with --resume then continues as if never interrupted.

torchrun starts one process for each GPU (without GPUs, for a share of the cores). The processes divide each batch of
--batch-size captions, and every caption has its negatives in the whole batch: losses and gradients are those of one
process, apart from rounding. A run may be resumed with another number of processes. All must see DATA and OUTPUT.

An option that is not given has the published value of the chosen recipe (Adam, learning rate 2e-4, hardest
negatives, margin 0.2, batch 128, gradient norm clipped at 2, bidirectional GRU). Number of epochs / number of epochs
after which the learning rate is divided by 10:
{_schedules()}
SHAN's paper states its 30 epochs, lambda, mu 1, mu 2 and margin; its other values here are SCAN's. HGAN and TSHSR are
reconstructed, and have the schedules of SGRAF.
SCAN's command line defaults to all negatives and a one-way GRU. The defaults here are those of the commands that its
authors recommend: the hardest negative and a bidirectional GRU."""

_ARGUMENTS = (
    *("model", "direction", "recipe", "train_split", "dev_split", "limit_dev_captions", "captions_per_image"),
    "mask_zero_regions",
)
_DEFAULTS = {"recipe": "f30k", "train_split": "train", "dev_split": "dev"}
_DIRECTED = [row for row in CATALOGUE.values() if row.directions]


def _offered() -> dict[str, Option]:
    """Every option that the command line has, by its published name."""
    found: dict[str, Option] = {}
    for known in (TRAINING, ENCODERS, *(row.options for row in CATALOGUE.values())):
        for name, option in known.items():
            if option.help is not None:
                found.setdefault(name, option)
    return found


_OFFERED = _offered()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `itm-fast train`. One that is None has the value of the recipe, or of the run resumed."""
    run = parser.add_argument_group("the run")
    run.add_argument("--model", type=_model, choices=tuple(CATALOGUE), help="which model (needed unless --resume)")
    run.add_argument(
        "--direction",
        choices=tuple(dict.fromkeys(direction for row in _DIRECTED for direction in row.directions)),
        help="words attend to regions (t2i), regions to words (i2t), or both (full); the default is named first: "
        + "; ".join(f"{row.name}: {', '.join(row.directions)}" for row in _DIRECTED),
    )
    run.add_argument("--recipe", choices=RECIPES, help="published schedule to follow (default f30k)")
    run.add_argument("--data", metavar="PATH", help="folder or .h5 file (needed unless --resume)")
    run.add_argument("--output", metavar="DIR", required=True, help="folder for this run; created if it does not exist")
    run.add_argument("--resume", action="store_true", help="continue the run in --output")
    run.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    run.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        metavar="NAME",
        help="force one backend for every operation; `itm-fast doctor` lists them",
    )
    run.add_argument(
        "--max-steps",
        type=_count,
        metavar="N",
        help="stop after N steps, for a trial run; the model is validated then, and saved as after an epoch",
    )
    run.add_argument(
        "--chunk",
        type=_count,
        metavar="N",
        help="encode N captions and their images at a time, and again in the backward pass: less memory for large "
        "batches, and the same losses; not for encoders with a BatchNorm (default: a process encodes its captions at "
        "once)",
    )
    run.add_argument("--tensorboard", action="store_true", help="write OUTPUT/tensorboard in addition to log.csv")
    run.add_argument("--quiet", action="store_true", help="no progress bars and no table after each epoch")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--vocab", metavar="JSON", help="vocabulary (default: built from the training and dev captions, as published)"
    )
    data.add_argument(
        "--min-count",
        type=_count,
        metavar="N",
        help="build the vocabulary from the words that appear at least N times (default 4)",
    )
    data.add_argument("--train-split", metavar="NAME", help="default train")
    data.add_argument("--dev-split", metavar="NAME", help="default dev")
    data.add_argument(
        "--limit-dev-captions",
        type=_count,
        metavar="N",
        help="validate on the first N captions and their images; the published code uses 5000",
    )
    data.add_argument(
        "--captions-per-image",
        type=_count,
        metavar="N",
        help="1 or 5, for folders with as many rows of features as captions; see `itm-fast convert --help`",
    )

    data.add_argument(
        "--mask-zero-regions",
        action="store_const",
        const=True,
        help="if the data have no region counts, leave out the all-zero regions at the end of each image; in the "
        "published code they take part in attention",
    )

    recipe, model = parser.add_argument_group("recipe"), parser.add_argument_group("model")
    for name in _OFFERED:
        _add(recipe if name in TRAINING else model, name)


def _add(group: Any, name: str) -> None:
    """Add one option; its value is stored under its published name."""
    option = _OFFERED[name]
    settings: dict[str, Any] = {"dest": name, "help": _help(name, option)}
    if isinstance(option.default, bool):
        settings["action"] = argparse.BooleanOptionalAction
    else:
        example = option.default[0] if isinstance(option.default, list) else option.default
        settings |= {"type": str if example is None else type(example), "metavar": option.metavar}
        if option.choices:
            settings["choices"] = option.choices
        if isinstance(option.default, list):
            settings["nargs"] = option.count or "+"
    group.add_argument(_flag(name), **settings)


def _help(name: str, option: Option) -> str:
    """An option's help text, with its default if it belongs to encoders or models, and with the models' names."""
    if name in TRAINING:
        return str(option.help)
    if name in ENCODERS:
        return f"{option.help}{_shown(option.default)}"
    found: dict[str, list[str]] = {}
    for row in CATALOGUE.values():
        own = row.options.get(name)
        if own is not None and own.help is not None:
            found.setdefault(f"{own.help}{_shown(own.default, name, row)}", []).append(row.name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in found.items())


def _shown(default: Any, name: str = "", row: Entry | None = None) -> str:
    """The default in brackets, with the values of recipes and directions that differ; "" for a switch or for None."""
    if default is None or isinstance(default, bool):
        return ""

    def text(value: Any) -> str:
        return " ".join(map(text, value)) if isinstance(value, list) else f"{value:g}" if value != str(value) else value

    others = [] if row is None else [f"{key}: {text(x[name])}" for key, x in row.differs.items() if name in x]
    return f" ({'; '.join([text(default), *others])})"


def _model(name: str) -> str:
    if name.lower() == "sgraf":
        raise argparse.ArgumentTypeError(
            "sgraf is the mean of two models: train sgr and saf, each in a folder of its own, and give both checkpoints"
            " to `itm-fast evaluate`"
        )
    return name


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Train, and print where the best checkpoint is."""
    output = Path(args.output)
    opt, arguments = _settled(args, output)
    return _train(args, output, opt, arguments)


def _settled(args: argparse.Namespace, output: Path) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The run's options and arguments (data, splits, ...), checked as far as torch is not needed."""
    if args.vocab is not None and args.min_count is not None:
        raise ValueError("--min-count is for a vocabulary built here; leave it out with --vocab")
    given = {name: getattr(args, name) for name in ("data", *_ARGUMENTS) if getattr(args, name) is not None}
    changes = _changes(args)
    if args.resume:
        from ..training import resume

        found = resume.load(output)
        arguments = found.arguments
        if "dev_captions" in arguments:  # the option's former name
            arguments["limit_dev_captions"] = arguments.pop("dev_captions")
        for name in _ARGUMENTS:
            if name in given and given[name] != arguments.get(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {given[name]!r}, but the run in {output} has "
                    f"{arguments.get(name)!r}; resume it as it is, or start another one elsewhere"
                )
        arguments = {**arguments, **given}
        opt = argparse.Namespace(**found.options)
    else:
        missing = [f"--{name}" for name in ("model", "data") if name not in given]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given, except with --resume")
        arguments = {**_DEFAULTS, **given}
        directions = CATALOGUE[arguments["model"]].directions
        if "direction" in given and not directions:
            names = " or ".join(row.name for row in _DIRECTED)
            raise ValueError(f"--direction is for --model {names}; {arguments['model']} has no choice of it")
        if directions:
            arguments.setdefault("direction", directions[0])
        opt = options(arguments["model"], recipe=arguments["recipe"], direction=arguments.get("direction"))
    others = [_flag(name) for name in changes if not hasattr(opt, name)]
    if others:
        own = ", ".join(sorted(_flag(name) for name in _OFFERED if hasattr(opt, name)))
        raise ValueError(f"{arguments['model']} has no option {', '.join(others)}; its options are {own}")
    vars(opt).update(changes)
    check(vars(opt), _flag)
    return opt, arguments


def _train(args: argparse.Namespace, output: Path, opt: argparse.Namespace, arguments: dict[str, Any]) -> int:
    from ..data import open_split
    from ..training import train

    data = Path(arguments["data"])
    shape = {
        "captions_per_image": arguments.get("captions_per_image"),
        "mask_zero_regions": arguments.get("mask_zero_regions", False),
    }
    if arguments["train_split"] == arguments["dev_split"] and not _torchrun.rank():
        warnings.warn(
            f"training and dev split are both {arguments['dev_split']}, so the best epoch is chosen by data that the "
            "model was trained on; --train-split and --dev-split name others",
            stacklevel=2,
        )
    train_split = open_split(data, arguments["train_split"], **shape)
    dev_split = open_split(data, arguments["dev_split"], limit_captions=arguments.get("limit_dev_captions"), **shape)
    size, dev_size = (split.features.shape[2] for split in (train_split, dev_split))
    if args.resume and size != opt.img_dim:
        raise ValueError(
            f"{data}: the {arguments['train_split']} split has {size:,} features per region, and the run in {output} "
            f"was begun with {opt.img_dim:,}; give the data that it was begun with"
        )
    if dev_size != size:
        raise ValueError(
            f"{data}: the {arguments['train_split']} split has {size:,} features per region, and the "
            f"{arguments['dev_split']} split {dev_size:,}; both must have the same"
        )
    opt.img_dim = size
    opt.data_path = str(data.parent)
    if not args.resume:
        opt.data_name = data.stem if data.is_file() else data.resolve().name
    vocabulary = _vocabulary(args, output / f"{opt.data_name}_vocab.json", [*train_split.captions, *dev_split.captions])
    if not args.quiet and not _torchrun.rank():
        print(_summary(opt, train_split, dev_split, len(vocabulary)), file=sys.stderr)
    result = train(
        opt,
        train_split,
        dev_split,
        vocabulary,
        output,
        resuming=args.resume,
        max_steps=args.max_steps,
        device=args.device,
        backend=args.backend,
        tensorboard=args.tensorboard,
        progress=not args.quiet,
        arguments=arguments,
        chunk=args.chunk,
    )
    if _torchrun.rank():
        return 0
    ended = "finished" if result.finished else "stopped"
    print(
        f"{ended} after {result.iterations} steps; best rsum {result.best_rsum:.1f} after epoch "
        f"{result.best_epoch}: {output / 'model_best.pth.tar'}"
    )
    return 0


def _flag(name: str) -> str:
    """The command-line flag of a published option."""
    option = _OFFERED.get(name)
    return f"--{(name if option is None or option.flag is None else option.flag).replace('_', '-')}"


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in _OFFERED if getattr(args, name) is not None}
    for name in ("no_imgnorm", "no_txtnorm"):  # published as negatives
        if name in found:
            found[name] = not found[name]
    return found


def _vocabulary(args: argparse.Namespace, saved: Path, captions: list[str]) -> Any:
    from ..data import Vocabulary

    if args.vocab is not None:
        return Vocabulary.load(args.vocab)
    if args.resume:
        return Vocabulary.load(saved)
    return Vocabulary.build(captions, min_count=4 if args.min_count is None else args.min_count)


def _summary(opt: argparse.Namespace, train_split: Any, dev_split: Any, words: int) -> str:
    I, R, F = train_split.features.shape
    return (
        f"{title(opt)}: {several(len(train_split.captions), 'caption')} of {several(I, 'image')} ({R} regions x {F}), "
        f"{words:,} words; dev {several(len(dev_split.captions), 'caption')} of "
        f"{several(len(dev_split.features), 'image')}; {several(opt.num_epochs, 'epoch')}, "
        f"learning rate {opt.learning_rate:g}, a tenth every {opt.lr_update}"
    )
