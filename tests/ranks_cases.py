"""What the processes of `test_ranks.py` do together: one start of the processes serves all tests."""

from __future__ import annotations

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
from training_cases import SMALL, TRAIN, WORDS, run_tiny

import itm_fast
from itm_fast._ranks import Ranks
from itm_fast.data import Split, TrainingBatches
from itm_fast.evaluation import Encoded, memory
from itm_fast.evaluation.matrix_free import blocks_of
from itm_fast.evaluation.rankings import rankings_of
from itm_fast.evaluation.tally import Asked
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
    for case, given in CASES.items():
        if ranks.world == 1:
            given = {**given, "chunk": None}
        found |= {(model, case): gradients(model, ranks, **given) for model in MODELS}
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

    def dies(self, batch):
        if self.iterations == 2 and ranks.rank == ranks.world - 1:
            os._exit(0)
        return update(self, batch)

    loop.Run._update = dies
    found["dead"] = caught(lambda: run_tiny(folder / "dead"))
    return found


class ByBlock(CrossAttentionScore):
    """Other last bits in blocks of another shape, as a backend may give them."""

    def score(self, image_state, words, *rest):
        return super().score(image_state, words, *rest) * (1 + 1e-6 * ((len(words) + len(image_state[0])) % 7))


class Slow(CrossAttentionScore):
    def score(self, *given):
        time.sleep(0.05)
        return super().score(*given)


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


def ranked(scorers, ranks: Ranks) -> tuple[list, int]:
    """All arrays of the rankings, in the process of rank 0, and how many blocks this process has scored."""
    counted = []
    with mock.patch.dict(memory._BLOCK, cpu=BLOCK), blocks_of(scorers, [embedded()] * len(scorers)) as blocks:
        tally = blocks.begin(Asked(folds=2, best=3)) if ranks.first else None
        tally = count_together(blocks, tally, ranks, progress=False, after=lambda mine: counted.append(mine.done.sum()))
    return [] if tally is None else arrays_of(tally), int(counted[-1])


def arrays_of(tally) -> list[np.ndarray]:
    found = []
    for one in rankings_of(tally):
        for counts in (one.counts, *one.folds):
            found += [*counts.i2t, *counts.t2i, counts.query_images]
        found += [array for side in ("i2t", "t2i") for array in one.best[side]]
    return found


def evaluations(ranks: Ranks) -> dict:
    found = {name: ranked(scorers, ranks) for name, scorers in SCORERS.items()}
    found["slow"] = ranked([(Slow if ranks.rank == ranks.world - 1 else CrossAttentionScore)()], ranks)
    return found


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
        torch.save(runs(folder, ranks), folder / f"runs{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise
    os._exit(0)  # without waiting for the process that died
