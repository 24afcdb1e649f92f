"""What the processes of `test_ranks.py` do together: one start of the processes serves all tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from training_cases import DEV, SMALL, TRAIN, WORDS, run_tiny, tiny_options

import itm_fast
from itm_fast._ranks import Ranks
from itm_fast.data import Split, TrainingBatches
from itm_fast.evaluation import Encoded, evaluate, memory, snapshots
from itm_fast.evaluation.matrix_free import Blocks, blocks_of
from itm_fast.evaluation.rankings import rankings_of
from itm_fast.evaluation.tally import Asked, Tally
from itm_fast.evaluation.together import count_together
from itm_fast.models import build
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.nn import CrossAttentionScore
from itm_fast.training import loop, options
from itm_fast.training.losses import batch_loss

RAGGED = Split(
    TRAIN.features[:],
    TRAIN.captions,
    TRAIN.caption_to_image,
    region_lengths=np.random.default_rng(0).integers(5, 37, len(TRAIN.features)).astype(np.int32),
)
_FEATURES = TRAIN.features[:]
_FEATURES[5, 7, 3] = np.nan
BROKEN = Split(_FEATURES, TRAIN.captions, TRAIN.caption_to_image)
MODELS = {name: {"sim_dim": 8} if "sim_dim" in row.options else {} for name, row in CATALOGUE.items()}
MODELS["hgan without global vectors"] = {"levels": [1.0, 0.0, 0.0], "graph_layers": 0, "granularities": []}
# Everything at once, in the dtype in which rounding is no excuse; then as published.
CASES = {
    "float64": {"split": RAGGED, "chunk": 3, "max_violation": False, "exclude_same_image": True},
    "float32": {"dtype": torch.float32},
}

def cases() -> list[tuple[str, str]]:
    return [*((model, "float64") for model in MODELS), *((model, "float32") for model in ("scan", "sgr", "saf"))]


BATCH = 14  # not a multiple of the numbers of processes


def gradients(name: str, ranks: Ranks, *, dtype=torch.float64, split=TRAIN, chunk=None, size=BATCH, **changes):
    """The loss of a batch, the gradients, what the model's buffers are afterwards, and the random generator's state."""
    small = {key: SMALL[key] for key in ("img_dim", "embed_size", "word_dim")}
    opt = options(name.split()[0], **{**small, **MODELS[name], **changes}, batch_size=size)
    opt.vocab_size, opt.device = len(WORDS), "cpu"
    torch.manual_seed(0)
    model = build(opt)
    for module in model.modules:
        module.to(dtype)
    batch = next(TrainingBatches(split, WORDS, size, rank=ranks.rank, world=ranks.world).epoch(0))
    batch = dataclasses.replace(batch, features=batch.features.to(dtype))
    model.train_start()
    loss = batch_loss(model, batch, opt, ranks, chunk)
    loss.backward()
    ranks.average([p.grad for p in model.params if p.grad is not None])
    return {
        "loss": loss.detach(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.params],
        "buffers": [b.clone() for module in model.modules for b in module.buffers()],
        "random": torch.get_rng_state(),
    }


def all_gradients(ranks: Ranks) -> dict:
    found = {}
    for model, case in cases():
        in_parts = ranks.world > 1 and model != "rcar"  # whose image encoder has a BatchNorm
        found[model, case] = gradients(model, ranks, **(CASES[case] if in_parts else {**CASES[case], "chunk": None}))
    with itm_fast.workspace(1e-5):  # so little scratch that SAF scores its captions in several blocks
        found["saf", "blocks"] = gradients("saf", ranks)
    found["sgr", "two"] = gradients("sgr", ranks, size=2)  # fewer than three processes
    return found


def runs(folder: Path, ranks: Ranks) -> dict:
    """Whole runs of `train`, what they returned and what they raised."""
    found = {"whole": run_tiny(folder / "whole", "saf")}
    found["again"] = caught(lambda: run_tiny(folder / "whole", "saf"))
    found["broken"] = caught(lambda: run_tiny(folder / "broken", train_split=BROKEN))
    update, calls = loop.Run._update, []

    def with_signal(self, batch):
        calls.append(1)
        if len(calls) == 4 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    loop.Run._update = with_signal
    found["interrupted"] = caught(lambda: run_tiny(folder / "parts", "saf"))
    loop.Run._update = update
    found["steps before"] = len(calls)
    found["resumed"] = run_tiny(folder / "parts", "saf", resuming=True)
    run_tiny(folder / "changed", "saf", max_steps=5)
    return found


def end(folder: Path, ranks: Ranks) -> str:
    """What the others find when the last process dies: two processes in training, three in an evaluation."""
    last = ranks.rank == ranks.world - 1
    if ranks.world == 3:
        dies = folder / "dies"
        with after_blocks(1, lambda: dies.touch() or os._exit(0) if last else until(dies.exists)):
            return caught(lambda: evaluated(state=folder / "dead"))
    update = loop.Run._update

    def dies(self, batch):
        if self.iterations == 2 and last:
            os._exit(0)
        return update(self, batch)

    loop.Run._update = dies
    return caught(lambda: run_tiny(folder / "dead"))


class ByBlock(CrossAttentionScore):
    """Other last bits in blocks of another shape, as a backend may give them."""

    def score(self, image_state, words, *rest):
        return super().score(image_state, words, *rest) * (1 + 1e-6 * ((len(words) + len(image_state[0])) % 7))


SCORERS = {
    "two scorers": [CrossAttentionScore("t2i"), CrossAttentionScore("i2t", pool="mean")],
    "bits by block": [ByBlock()],
}
BLOCK = (5, 7)  # images and captions of a block


def embedded(images: int = 20, captions: int = 50) -> Encoded:
    """Unit embeddings; some captions and some images are equal, and some images have no caption."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, captions)
    lengths[::5] = 4
    edges = np.concatenate([[0], np.cumsum(lengths)])
    normal = torch.Generator().manual_seed(0)
    image, words = torch.randn(images, 6, 8, generator=normal), torch.randn(int(edges[-1]), 8, generator=normal)
    image[::4] = image[0]
    for t in range(10, captions, 10):
        words[edges[t] : edges[t] + 4] = words[:4]
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (image, words)]
    owner = rng.integers(0, images, captions)
    return Encoded(unit[0], None, unit[1], torch.from_numpy(edges).int(), owner)


class Own:
    """In place of snapshots: how many blocks this process has counted."""

    def after(self, tally) -> None:
        self.blocks = int(tally.done.sum())

    def save(self) -> None:
        pass

    collect = save

    def kept(self):
        return contextlib.nullcontext()


def until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def last_is_busy(ranks: Ranks):
    """Inside, the last process is not done with its first block before the others, which wait until it has taken that
    one, have taken all that were left."""
    last = ranks.rank == ranks.world - 1
    real = Blocks.add

    def add(self, tally, queue):
        for block in real(self, tally, queue):
            queue._store.add("last is busy", last)
            if last:
                until(lambda: queue._store.add("tickets", 0) >= len(queue._numbers))
            else:
                until(lambda: queue._store.add("last is busy", 0))
            yield block

    with mock.patch.object(Blocks, "add", add):
        yield


def ranked(scorers, ranks: Ranks) -> tuple[list, int]:
    """All arrays of the rankings, in the process of rank 0, and how many blocks this process has scored."""
    own = Own()
    with mock.patch.dict(memory._BLOCK, cpu=BLOCK), blocks_of(scorers, [embedded()] * len(scorers)) as blocks:
        tally = blocks.begin(Asked(folds=2, best=3)) if ranks.first else None
        tally = count_together(blocks, tally, ranks, snapshots=own, progress=False)
    return [] if tally is None else arrays_of(tally), own.blocks


def arrays_of(tally) -> list[np.ndarray]:
    found = []
    for one in rankings_of(tally):
        for counts in (one.counts, *one.folds):
            found += [*counts.i2t, *counts.t2i, counts.query_images]
        found += [array for side in ("i2t", "t2i") for array in one.best[side]]
    return found


def evaluations(ranks: Ranks) -> dict:
    found = {name: ranked(scorers, ranks) for name, scorers in SCORERS.items()}
    with last_is_busy(ranks) if ranks.world > 1 else contextlib.nullcontext():
        found["one is busy"] = ranked([CrossAttentionScore()], ranks)
    return found


def evaluated(together: bool = True, **more) -> tuple[str, list[np.ndarray]]:
    """The report, without the lines on speed, and the best items of two models on 8 images and 24 captions."""
    models = []
    for name in ("scan", "saf"):
        opt = tiny_options(name)
        opt.vocab_size, opt.device = len(WORDS), "cpu"
        torch.manual_seed(0)
        models.append(build(opt))
    with mock.patch.dict(memory._BLOCK, cpu=(3, 4)):
        report = evaluate(
            models, DEV, WORDS, folds=2, keep_scores=False, best=3, worst=2, progress=False, together=together, **more
        )
    return str(report), [array for side in ("i2t", "t2i") for array in report.best[side]]


BLOCKS = 3 * 6  # of 8 images and 24 captions, in `evaluated`


def same_report(found, wanted) -> bool:
    return found[0] == wanted[0] and all(np.array_equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


@contextlib.contextmanager
def after_blocks(number: int, action):
    """Inside, `action` is called once this process has counted and kept so many blocks."""
    real = Blocks.add

    def add(self, tally, numbers):
        for count, block in enumerate(real(self, tally, numbers), 1):
            yield block
            if count == number:
                action()

    with (
        mock.patch.object(Blocks, "add", add),
        mock.patch.object(snapshots, "_EVERY", -1.0),
        mock.patch.object(snapshots, "_SHARE", np.inf),
    ):
        yield


def interrupt() -> None:
    raise KeyboardInterrupt


def reports(folder: Path, ranks: Ranks) -> dict:
    """Reports of all processes together: of a new evaluation, and of one that one process alone has begun."""
    found = {"new": evaluated()}
    if ranks.first:
        with after_blocks(5, interrupt):
            found["begun"] = caught(lambda: evaluated(together=False, state=folder / "begun"))
    blocks = []
    with mock.patch.object(Tally, "add", lambda self, *given: blocks.append(1) or add(self, *given)):
        found["gone on"] = evaluated(state=folder / "begun")
    return {**found, "blocks": len(blocks), "left": sorted(str(p.name) for p in (folder / "begun").iterdir())}


add = Tally.add


def caught(function) -> str:
    try:
        return f"returned {function()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    ranks = Ranks(rank, world)
    try:
        torch.save({"gradients": all_gradients(ranks)}, folder / f"gradients{rank}")
        torch.save(evaluations(ranks), folder / f"evaluations{rank}")
        torch.save(reports(folder, ranks), folder / f"reports{rank}")
        other = caught(lambda: ranks.same("kind of device", "cpu" if ranks.first else "cuda"))
        found = {**runs(folder, ranks), "other": other, "dead": end(folder, ranks)}
        torch.save(found, folder / f"runs{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise
    os._exit(0)  # without waiting for the process that died
