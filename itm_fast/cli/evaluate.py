"""`itm-fast evaluate`: checkpoints and precomputed features in, recall tables out."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _torchrun
from .._lock import locked_folder
from .._names import BACKENDS
from .._text import several
from ._checkpoints import (
    check_features,
    check_vocabulary,
    find_vocabulary,
    member_names,
    members,
    with_name_of_ensemble,
)
from ._pictures import pictures_of
from ._plans import plan_evaluation, plan_workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..evaluation import Report
    from ..evaluation.html_report import Pictures

HELP = """\
Evaluate one checkpoint, or several and their ensemble, on precomputed region features.

Every image is scored against every caption and both are ranked: R@1, R@5, R@10, median and mean rank, and rsum (the
sum of the six recalls), with the recalls of a random ranking below them. Several checkpoints are reported one by one
and as the mean of their score matrices; SGRAF is the mean of an SGR and a SAF checkpoint.

  Flickr30K   itm-fast evaluate --checkpoint SGR.pth.tar --checkpoint SAF.pth.tar --data data/f30k_precomp
  COCO 5K,1K  itm-fast evaluate --checkpoint SGR.pth.tar --data data/coco_precomp --split testall --folds 5
  files       itm-fast evaluate ... --output results --trec 100
  long run    itm-fast evaluate ... --scores sgr.npy          (after an interruption: add --resume)
              itm-fast evaluate ... --state run                   (after an interruption: the same command)
  many GPUs   torchrun --nproc-per-node 8 -m itm_fast evaluate ...    (the numbers of one process; --state too)
  many jobs   itm-fast evaluate ... --state run3 --part 3/8, and then: itm-fast evaluate --merge run1 run2 ...
  memory      itm-fast evaluate --workload coco-eval-5k --dry-run

Folds. --folds 5 also cuts the images into 5 equal, consecutive parts, ranks each against its own captions only, and
averages the metrics: on the 5,000 images of COCO's testall this is "COCO 1K", and the whole pool is "COCO 5K".

Ties. --ties says where a wrong item with exactly the score of the right one is ranked:
  pessimistic  above the right one (the default), so that a model that gives every pair the same score gains nothing
  optimistic   below the right one
  expected     in every possible order; the metrics are the means over all orders
  published    above the right one if its index is higher: the order of the published evaluators, argsort()[::-1], if
               the sort is stable
If the rules give different numbers, a line under the table shows the range, and --output has the numbers of all four.
CxC and ECCV metrics use the same rule, but pessimistic in place of expected.
NaN and infinite scores are refused; the message names the image and the caption.

Captions. An image may have any number of captions. Its rank is that of its best caption. An image without captions is
no query, but stays in the pool as a wrong answer. If the data have COCO's image and caption ids, CxC and ECCV Caption
metrics are reported too (they need pip install '.[eccv]' in the source folder of itm-fast), and with --scores and
--pmrp DIR Plausible Match R-Precision."""


# What the plan of a workload reads; --no-progress changes nothing there.
_PLANNED = ("workload", "dry_run", "checkpoint", "scores", "memory_gb", "device", "backend", "no_progress")
_ALONE = ("scores", "resume", "part", "merge", "dry_run", "workload")  # what several processes cannot do together
_MERGED = ("merge", "output", "trec", "no_progress")  # what --merge reads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from ..evaluation import TIES
    from ..evaluation.workloads import WORKLOADS

    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="FILE",
        help="model_best.pth.tar of a published model or of itm-fast train, or its folder; repeat the option for an "
        "ensemble; a file that holds two networks (model_A, model_B) counts as two members",
    )
    parser.add_argument("--data", metavar="DIR_OR_H5", help="SCAN's folder of .npy and .txt files, or an HDF5 file")
    parser.add_argument("--split", default="test", help="dev, test, testall, ... (default: test)")
    parser.add_argument(
        "--vocab",
        metavar="JSON",
        help="the vocabulary that the checkpoints were trained with; default: the first one found beside the first "
        "checkpoint, in the folder where that was trained, or near the data",
    )
    parser.add_argument("--folds", type=int, metavar="N", help="also average over N parts of the images; 5 for COCO 1K")
    parser.add_argument(
        "--limit-captions",
        type=int,
        metavar="N",
        help="use the first N captions and their images; the published code does this with 5000 on dev",
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
        help="if the data have no region counts, leave out the all-zero regions at the end of each image; in the "
        "published code they take part in attention",
    )
    parser.add_argument(
        "--ties", choices=TIES, default=TIES[0], help="where ties are ranked: see Ties above (default: pessimistic)"
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
        "--memory-gb",
        type=float,
        metavar="GB",
        help="memory budget in GB (10^9 bytes). On the CPU it covers the whole process: Python, torch, model, encoded "
        "data, scores and scratch; on a GPU, the memory of the GPU. Under torchrun it is for each process, and the "
        "encoded data are in a file that the processes of a machine share. Default: 70 %% of the memory available on "
        "the CPU, 80 %% on a GPU",
    )
    compute.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="images, and captions, encoded at once (default: 128)"
    )
    compute.add_argument("--dry-run", action="store_true", help="print what memory, disk and time are needed, and stop")
    compute.add_argument(
        "--workload",
        choices=sorted(WORKLOADS),
        help="with --dry-run, in place of --data: print the plan for the sizes of this test set; without --checkpoint, "
        "for every model",
    )
    long = parser.add_argument_group("long runs")
    long.add_argument(
        "--state",
        metavar="DIR",
        help="keep the counts of the blocks that are scored here, every minute and after an interruption; the same "
        "command goes on from there. During the run, embeddings that do not fit in memory, or that the processes of "
        "torchrun share, are here too (several machines: in each one's TMPDIR)",
    )
    long.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="score only the K-th of N parts of the blocks, into a --state of its own, as one of N jobs that need not "
        "know of each other",
    )
    long.add_argument(
        "--merge",
        nargs="+",
        metavar="DIR",
        help="in place of --checkpoint and --data: add up the --state folders of all parts and print the report; "
        "its report.html has no list of failed queries",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="DIR",
        help="write here: report.html (open it in a browser), results.txt, .json, .csv and .tex (booktabs), and "
        "ranks.npz for `itm-fast compare`",
    )
    output.add_argument(
        "--pictures",
        metavar="DIR",
        help="for report.html: the folder of the pictures. Their names are the first words of the lines of "
        "SPLIT_pictures.txt beside the features, or end in COCO's image ids (default: those of the demo alone)",
    )
    output.add_argument(
        "--trec", type=int, metavar="K", help="also write TREC run and qrels files of the K best items to --output"
    )
    output.add_argument(
        "--scores",
        metavar="FILE.npy",
        help="keep the score matrix, float32 [images, captions], and make the run resumable; an ensemble FILE.npy is "
        "the mean of its members' FILE-1.npy, FILE-2.npy, ...",
    )
    output.add_argument(
        "--resume", action="store_true", help="continue interrupted --scores files and reuse finished ones"
    )
    output.add_argument(
        "--pmrp",
        metavar="DIR",
        help="with --scores, also report PMRP: the folder of pm_image_to_caption.json and pm_caption_to_image.json, "
        "which the eccv-caption project (github.com/naver-ai/eccv-caption) offers for download",
    )
    output.add_argument("--no-progress", action="store_true", help="no progress bars on standard error")


def run(args: argparse.Namespace) -> int:
    """Evaluate, or print the plan; the tables go to standard output."""
    _check(args)
    from .._backends import use_backend

    with use_backend(args.backend) if args.backend != "auto" else contextlib.nullcontext(), _output(args):
        if args.workload:
            return plan_workload(args)
        return _merge(args) if args.merge else _evaluate(args)


def _check(args: argparse.Namespace) -> None:
    if _torchrun.world() > 1 and (alone := [name for name in _given(args) if name in _ALONE]):
        raise ValueError(
            f"torchrun started {_torchrun.world()} processes, and --{alone[0].replace('_', '-')} is for one; leave it "
            "out, or start the command without torchrun"
        )
    if args.workload:
        if not args.dry_run:
            raise ValueError("--workload has no data to evaluate, only sizes to plan for; give --dry-run as well")
        if unread := [name for name in _given(args) if name not in _PLANNED]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
            raise ValueError(f"the plan of a --workload does not read {flags}; leave that out")
        return
    if args.merge:
        if unread := [name for name in _given(args) if name not in _MERGED]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
            raise ValueError(f"--merge reports what the parts were run with, and does not read {flags}; leave that out")
        _check_trec(args)
        return
    if not args.checkpoint or not args.data:
        raise ValueError("give --checkpoint (a model_best.pth.tar) and --data (a folder or an HDF5 file)")
    if args.resume and not args.scores:
        raise ValueError("--resume continues a score file; name it with --scores FILE.npy")
    if args.pmrp and not args.scores:
        raise ValueError("PMRP (--pmrp) is computed from the whole score matrix; keep it with --scores FILE.npy")
    if args.scores and args.state:
        raise ValueError("--scores FILE.npy is made to be resumed by itself (--resume); leave out --state")
    if args.part and not args.state:
        raise ValueError("--part scores some blocks into a folder of its own; name it with --state DIR")
    if args.part and args.pictures:
        raise ValueError("--part writes no report, so that --pictures has no use; leave it out")
    if args.part and args.output:
        raise ValueError("--part has no results yet; give --output when the parts are added up by --merge")
    if not args.part:
        _check_trec(args)
    if args.folds is not None and args.folds < 1:
        raise ValueError(f"--folds wants at least 1 part, got {args.folds}")


def _check_trec(args: argparse.Namespace) -> None:
    if args.trec is not None and not args.output:
        raise ValueError("--trec writes its files to --output DIR; give that as well")
    if args.pictures and not args.output:
        raise ValueError("--pictures are for report.html, which --output DIR writes; give that as well")
    if args.trec is not None and args.trec < 1:
        raise ValueError(f"--trec wants how many items to write, at least 1, got {args.trec}")


def _part(text: str) -> tuple[int, int]:
    """Read K/N."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"wants K/N, such as 3/8 for the third of eight parts, got {text}")
    return int(k), int(n)


def _given(args: argparse.Namespace) -> list[str]:
    """The options whose values are not their defaults, in the order of --help."""
    defaults = argparse.ArgumentParser(add_help=False)
    add_arguments(defaults)
    return [name for name, value in vars(defaults.parse_args([])).items() if getattr(args, name) != value]


def _output(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Create and lock --output before anything is scored: if that cannot be done, hours of scoring would be lost."""
    if not args.output or args.dry_run or _torchrun.rank():
        return contextlib.nullcontext()
    return locked_folder(Path(args.output), "results")


def _evaluate(args: argparse.Namespace) -> int:
    from ..data import open_split
    from ..evaluation import evaluate
    from ..evaluation.html_report import WORST
    from ..evaluation.pipeline import Prepared
    from ..models._building import rebuild
    from ..models._common import usable_device

    loaded = members(args.checkpoint)
    split = open_split(
        args.data,
        args.split,
        limit_captions=args.limit_captions,
        captions_per_image=args.captions_per_image,
        mask_zero_regions=args.mask_zero_regions,
    )
    pictures = pictures_of(args.pictures, args.data, args.split, split)
    vocab_path, vocab = find_vocabulary(args, loaded[0])
    device = usable_device(args.device)
    models = [rebuild(found, device) for found in loaded]
    for found in loaded:
        check_features(found, split, args)
        check_vocabulary(found, vocab_path, vocab)
    names = member_names(loaded)
    if args.dry_run:
        plan_evaluation(args, names, models, split, vocab)
        return 0
    settings = {
        "checkpoints": [os.path.abspath(found.path) for found in loaded],
        "epochs": [found.epoch for found in loaded],
        "data": os.path.abspath(args.data),
        "split": args.split,
        "vocabulary": os.path.abspath(vocab_path),
        "limit_captions": args.limit_captions,
    }
    given = {"names": names, "folds": args.folds, "ties": args.ties, "batch_size": args.batch_size}
    given |= {"memory_gb": args.memory_gb, "settings": settings}
    if args.part:
        prepared = Prepared.of(models, split, vocab, **given)
        tally = prepared.count(args.trec, args.state, args.part, not args.no_progress)
        assert tally is not None
        print(_done(args.part, tally.done, args.state))
        print("when all parts are done: itm-fast evaluate --merge DIR DIR ...")
        return 0
    report = evaluate(
        models,
        split,
        vocab,
        **given,
        scores=args.scores,
        resume=args.resume,
        progress=not args.no_progress,
        keep_scores=args.scores is not None and args.trec is not None,
        worst=WORST if args.output else 0,
        best=None if args.scores else args.trec,
        state=args.state,
        together=args.scores is None,
        pmrp=args.pmrp,
    )
    if _torchrun.rank():
        return 0
    _print(args, report, (split.image_ids, split.caption_ids), pictures)
    return 0


def _done(part: tuple[int, int], done: NDArray[np.bool_], state: str) -> str:
    """What a part has scored."""
    count = int(done.sum())
    if not count:
        only = f"{'is' if len(done) == 1 else 'are'} only {several(len(done), 'block')}"
        return f"part {part[0]}/{part[1]} has none to do, as there {only}; {state} may be merged all the same"
    return f"{count:,} of {several(len(done), 'block')} {'is' if count == 1 else 'are'} in {state}"


def _merge(args: argparse.Namespace) -> int:
    from ..evaluation.counted import report_of
    from ..evaluation.snapshots import merged

    tally = merged(args.merge)
    if args.trec is not None and args.trec > (tally.asked.best or 0):
        kept = f"only the {tally.asked.best} best items" if tally.asked.best else "no best items"
        raise ValueError(f"--trec {args.trec}: the parts kept {kept} of each query; run them with --trec {args.trec}")
    _print(args, report_of(tally), (tally.asked.image_ids, tally.asked.caption_ids))
    return 0


def _print(
    args: argparse.Namespace,
    report: Report,
    ids: tuple[NDArray | None, NDArray | None],
    pictures: Pictures | None = None,
) -> None:
    """Print the report and write its files."""
    from ..evaluation import write_trec
    from ..evaluation.report import speed_line

    settings = report.settings
    report = with_name_of_ensemble(report)
    print(report)
    print(f"vocabulary: {settings['vocabulary']}")
    print(f"captions: {settings['captions']:,}, {settings['distinct_captions']:,} distinct")
    for system in report.systems:
        if line := speed_line(system, settings["device"]):
            print(line)
    if report.relevance_missing and any(one is not None for one in ids):
        print(report.relevance_missing)
    if not args.output:
        return
    written = report.save(args.output, pictures)
    found = report.score if report.best is None else report.best
    if args.trec is not None and found is not None and report.pairs is not None:
        owner = report.pairs[0]  # a caption describes one image here
        written += write_trec(args.output, found, owner, top=args.trec, image_ids=ids[0], caption_ids=ids[1])
    print("written: " + ", ".join(map(str, written)))
