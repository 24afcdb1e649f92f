"""`itm-fast train`: the published recipes on precomputed features."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .._names import BACKENDS
from ..training.recipe import DIRECTIONS, MODELS, RECIPES, check, options

HELP = """Train SGR, SAF (the two halves of SGRAF), SCAN, SHAN, HGAN, TSHSR, or a plain dual encoder beside them.

HGAN and TSHSR are reconstructed from the abstract: the equations are not public to us. Their schedules are SGRAF's.

  itm-fast train --model sgr --data data/f30k_precomp --output runs/f30k_sgr
  itm-fast train --model scan --direction i2t --recipe coco --data data/coco_precomp --output runs/coco_i2t
  itm-fast train --model shan --word-vectors glove.840B.300d.txt --data data/f30k_precomp --output runs/f30k_shan

DATA is SCAN's folder (train_ims.npy, train_caps.txt, dev_ims.npy, dev_caps.txt) or an HDF5 file of
`itm-fast convert`. OUTPUT gets model_best.pth.tar (best epoch by the sum of the dev recalls) and
checkpoint.pth.tar (last epoch), which the published code reads too, the vocabulary, log.csv and resume.pt.
Ctrl-C finishes the step at hand and saves; the same command with --resume goes on as if never interrupted.

Every option left out is the published one of the chosen recipe (Adam, learning rate 2e-4, hardest
negatives, margin 0.2, batch 128, gradient norm clipped at 2, bidirectional GRU):
  f30k   sgr, tshsr 40 epochs, a tenth of the learning rate after 30; scan, shan 30/15; all others 30/20
  coco   shan 30/15, all others 20/10; scan and shan with learning rate 5e-4
SHAN's paper gives 30 epochs, lambda, mu 1, mu 2 and the margin; the rest, unstated there, is SCAN's.
SCAN's own command-line defaults are all negatives and a one-way GRU; its authors' recommended commands, and
the defaults here, are the hardest negative and the bidirectional GRU."""

_PLACES = (
    *("model", "direction", "recipe", "train_split", "dev_split", "dev_captions", "captions_per_image"),
    "mask_zero_regions",
)
_DEFAULTS = {"recipe": "f30k", "train_split": "train", "dev_split": "dev"}
# flag -> published option
_OPTIONS = {
    "epochs": "num_epochs",
    "lr_update": "lr_update",
    "lr": "learning_rate",
    "batch_size": "batch_size",
    "margin": "margin",
    "max_violation": "max_violation",
    "exclude_same_image": "exclude_same_image",
    "grad_clip": "grad_clip",
    "val_step": "val_step",
    "seed": "seed",
    "embed_size": "embed_size",
    "word_dim": "word_dim",
    "num_layers": "num_layers",
    "bi_gru": "bi_gru",
    "imgnorm": "no_imgnorm",
    "txtnorm": "no_txtnorm",
    "sim_dim": "sim_dim",
    "sgr_steps": "sgr_step",
    "agg_func": "agg_func",
    "raw_feature_norm": "raw_feature_norm",
    "lambda_softmax": "lambda_softmax",
    "lambda_lse": "lambda_lse",
    "precomp_enc_type": "precomp_enc_type",
    "graph_layers": "graph_layers",
    "granularities": "granularities",
    "levels": "levels",
    "lambda_t2i": "lambda_t2i",
    "lambda_i2t": "lambda_i2t",
    "lambda_global": "lambda_global",
    "share_local": "share_local",
    "share_global": "share_global",
    "context_nodes": "context_nodes",
    "word_vectors": "word_vectors",
    "gate": "gate",
    "gate_sharing": "gate_sharing",
    "affinity": "affinity",
    "pooling": "pooling",
    "projection_bias": "projection_bias",
    "mu1": "mu1",
    "mu2": "mu2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `itm-fast train`. None means: as the recipe, or the interrupted run, has it."""
    switch = argparse.BooleanOptionalAction

    run = parser.add_argument_group("the run")
    run.add_argument("--model", type=_model, choices=MODELS, help="which model (needed unless --resume)")
    run.add_argument(
        "--direction",
        choices=("t2i", "i2t", "full"),
        help="scan, shan: who attends; t2i: words to regions (scan's default); i2t; full: shan, both (its default)",
    )
    run.add_argument("--recipe", choices=RECIPES, help="published schedule to follow (default f30k)")
    run.add_argument("--data", metavar="PATH", help="folder or .h5 file (needed unless --resume)")
    run.add_argument("--output", metavar="DIR", required=True, help="folder of this run, made when absent")
    run.add_argument("--resume", action="store_true", help="continue the run in --output")
    run.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
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
        help="stop after N steps, for a trial run: the weights of that "
        "moment are validated and may be kept as the best",
    )
    run.add_argument("--tensorboard", action="store_true", help="write OUTPUT/tensorboard besides log.csv")
    run.add_argument("--quiet", action="store_true", help="no bars and no table per epoch")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--vocab", metavar="JSON", help="vocabulary (default: built from the training and dev captions, as published)"
    )
    data.add_argument(
        "--min-count", type=_count, metavar="N", help="words a built vocabulary keeps: seen N times (default 4)"
    )
    data.add_argument("--train-split", metavar="NAME", help="default train")
    data.add_argument("--dev-split", metavar="NAME", help="default dev")
    data.add_argument(
        "--dev-captions", type=_count, metavar="N", help="validate on the first N captions (the published code: 5000)"
    )
    data.add_argument(
        "--captions-per-image", type=_count, metavar="N", help="1 or 5, where a folder's features leave it open"
    )

    data.add_argument(
        "--mask-zero-regions",
        action="store_const",
        const=True,
        help="where the data have no region counts, leave out the all-zero regions at each image's end (published: "
        "they take part in attention)",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, metavar="N")
    recipe.add_argument(
        "--lr-update", type=int, metavar="N", help="epochs between cuts of the learning rate to a tenth"
    )
    recipe.add_argument("--lr", type=float, help="learning rate of the first epoch")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="captions, each with its image")
    recipe.add_argument("--margin", type=float, help="of the ranking loss")
    recipe.add_argument("--max-violation", action=switch, help="the hardest negative counts alone (default), or all do")
    recipe.add_argument(
        "--exclude-same-image",
        action=switch,
        help="other captions of an image are no negatives to it (published, and default: they are)",
    )
    recipe.add_argument("--grad-clip", type=float, metavar="NORM", help="0 switches clipping off")
    recipe.add_argument("--val-step", type=int, metavar="N", help="also validate every N steps, for the log alone")
    recipe.add_argument("--seed", type=int, help="of weights, dropout and data order (default 0)")

    model = parser.add_argument_group("model")
    model.add_argument("--embed-size", type=int, metavar="D", help="joint embedding (1024)")
    model.add_argument("--word-dim", type=int, metavar="N", help="word embedding (300)")
    model.add_argument("--num-layers", type=int, metavar="N", help="of the GRU (1)")
    model.add_argument("--bi-gru", action=switch, help="bidirectional GRU (default) or one-way")
    model.add_argument("--imgnorm", action=switch, help="unit-length regions (default) or as they come")
    model.add_argument("--txtnorm", action=switch, help="unit-length words (default) or as they come")
    model.add_argument("--sim-dim", type=int, metavar="S", help="sgr, saf, tshsr: similarity vector (256)")
    model.add_argument("--sgr-steps", type=int, metavar="K", help="sgr, tshsr: reasoning steps (3)")
    model.add_argument("--agg-func", choices=("LogSumExp", "Mean", "Max", "Sum"), help="scan (LogSumExp)")
    model.add_argument(
        "--raw-feature-norm",
        choices=("clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "softmax", "no_norm"),
        help="scan: norm of the affinities (clipped_l2norm)",
    )
    model.add_argument("--lambda-softmax", type=float, metavar="X", help="scan (9 for t2i, 4 for i2t), shan (15)")
    model.add_argument("--lambda-lse", type=float, metavar="X", help="scan (6 for t2i; i2t: 5 on f30k, 20 on coco)")
    model.add_argument("--precomp-enc-type", choices=("basic", "weight_norm"), help="scan (basic)")
    model.add_argument("--graph-layers", type=int, metavar="N", help="hgan: layers of the feature graphs (2)")
    model.add_argument(
        "--granularities", type=int, nargs="+", metavar="C", help="hgan: numbers of channel groups (1 4 16)"
    )
    model.add_argument(
        "--levels",
        type=float,
        nargs=3,
        metavar="X",
        help="hgan: weights of the local-local, global-local and global-global similarity (1 1 1)",
    )
    model.add_argument("--lambda-t2i", type=float, metavar="X", help="hgan, tshsr: words attending to regions (9)")
    model.add_argument("--lambda-i2t", type=float, metavar="X", help="hgan, tshsr: regions attending to words (4)")
    model.add_argument("--lambda-global", type=float, metavar="X", help="hgan: global vectors attending to locals (1)")
    model.add_argument("--share-local", type=float, metavar="X", help="hgan: of t2i in the local-local term (0.5)")
    model.add_argument(
        "--share-global", type=float, metavar="X", help="hgan: of the image in the global-local term (0.5)"
    )
    model.add_argument(
        "--context-nodes", type=int, nargs="+", metavar="C", help="tshsr: context nodes of each level (4 1)"
    )
    model.add_argument(
        "--word-vectors",
        metavar="FILE",
        help="shan: fixed vectors beside the learned ones of --word-dim; GloVe or word2vec text, word2vec binary, or a "
        ".npy array with a row for every word of the vocabulary (none: words are learned alone)",
    )
    model.add_argument(
        "--gate", choices=("scalar", "vector"), help="shan: one number or one for every dimension (scalar)"
    )
    model.add_argument("--gate-sharing", action=switch, help="shan: one gate for both modalities (each has its own)")
    model.add_argument(
        "--affinity",
        choices=("cosine", "dot"),
        help="shan: of the projected vectors; dot is the paper's letter (cosine)",
    )
    model.add_argument("--pooling", choices=("mean", "sum"), help="shan: of the local cosines (mean)")
    model.add_argument("--projection-bias", action=switch, help="shan: biases in the affinity's projections (none)")
    model.add_argument("--mu1", type=float, metavar="X", help="shan: share of the regions in the local term (0.3)")
    model.add_argument(
        "--mu2", type=float, metavar="X", help="shan: share of the image in the global-to-local term (0.5)"
    )


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
    """Train, and say where the best checkpoint is."""
    output = Path(args.output)
    opt, places = _settled(args, output)
    return _train(args, output, opt, places)


def _settled(args: argparse.Namespace, output: Path) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options of the run, and where its data are; what can be refused without torch is refused before its import."""
    if args.vocab is not None and args.min_count is not None:
        raise ValueError("--min-count is for a vocabulary built here; leave it out with --vocab")
    given = {name: getattr(args, name) for name in ("data", *_PLACES) if getattr(args, name) is not None}
    changes = _changes(args)
    check(changes, _flag)
    if args.resume:
        from ..training import resume

        found = resume.load(output)
        places = found.arguments
        for name in _PLACES:
            if name in given and given[name] != places.get(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {given[name]!r}, but the run in {output} has "
                    f"{places.get(name)!r}; resume it as it is, or start another one elsewhere"
                )
        places = {**places, **given}
        opt = argparse.Namespace(**found.options)
    else:
        missing = [f"--{name}" for name in ("model", "data") if name not in given]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given, except with --resume")
        places = {**_DEFAULTS, **given}
        directions = DIRECTIONS.get(places["model"])
        if "direction" in given and directions is None:
            raise ValueError(f"--direction is for --model scan or shan; {places['model']} has no choice of it")
        if directions is not None:
            places.setdefault("direction", directions[0])
        opt = options(places["model"], recipe=places["recipe"], direction=places.get("direction"))
    others = [_flag(name) for name in changes if not hasattr(opt, name)]
    if others:
        own = ", ".join(sorted(_flag(name) for name in _OPTIONS.values() if hasattr(opt, name)))
        raise ValueError(f"{places['model']} has no option {', '.join(others)}; its options are {own}")
    vars(opt).update(changes)
    return opt, places


def _train(args: argparse.Namespace, output: Path, opt: argparse.Namespace, places: dict[str, Any]) -> int:
    from ..data import open_split
    from ..training import train

    data = Path(places["data"])
    shape = {
        "captions_per_image": places.get("captions_per_image"),
        "mask_zero_regions": places.get("mask_zero_regions", False),
    }
    train_split = open_split(data, places["train_split"], **shape)
    dev_split = open_split(data, places["dev_split"], limit_captions=places.get("dev_captions"), **shape)
    size, dev_size = (split.features.shape[2] for split in (train_split, dev_split))
    if args.resume and size != opt.img_dim:
        raise ValueError(
            f"{data}: the {places['train_split']} split has {size:,} features per region, and the run in {output} was "
            f"begun with {opt.img_dim:,}; give the data that it was begun with"
        )
    if dev_size != size:
        raise ValueError(
            f"{data}: the {places['train_split']} split has {size:,} features per region, and the "
            f"{places['dev_split']} split {dev_size:,}; both must have the same"
        )
    opt.img_dim = size
    opt.data_path = str(data.parent)
    if not args.resume:
        opt.data_name = data.stem if data.is_file() else data.resolve().name
    vocabulary = _vocabulary(args, output / f"{opt.data_name}_vocab.json", [*train_split.captions, *dev_split.captions])
    if not args.quiet:
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
        arguments=places,
    )
    ended = "finished" if result.finished else "stopped"
    print(
        f"{ended} after {result.iterations} steps; best rsum {result.best_rsum:.1f} after epoch "
        f"{result.best_epoch}: {output / 'model_best.pth.tar'}"
    )
    return 0


def _flag(name: str) -> str:
    """How the command line calls a published option."""
    found = next((flag for flag, option in _OPTIONS.items() if option == name), name)
    return f"--{found.replace('_', '-')}"


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    found = {_OPTIONS[flag]: getattr(args, flag) for flag in _OPTIONS if getattr(args, flag) is not None}
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
    name = f"SCAN {opt.cross_attn}" if hasattr(opt, "cross_attn") else getattr(opt, "system", None) or opt.module_name
    name += f" {opt.alignment}" if hasattr(opt, "alignment") else ""
    I, R, F = train_split.features.shape
    return (
        f"{name}: {len(train_split.captions)} captions of {I} images ({R} regions x {F}), {words} words; "
        f"dev {len(dev_split.captions)} captions of {len(dev_split.features)} images; "
        f"{opt.num_epochs} epochs, learning rate {opt.learning_rate:g}, a tenth every {opt.lr_update}"
    )
