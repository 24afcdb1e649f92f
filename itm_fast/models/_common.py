"""What all models share: norms, the GRU of the text encoders, checks of options, and the published model object."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import _torchrun
from .._checks import Arguments, Shape
from .._ranks import own_group
from .._share import share
from ..nn import PairScorer
from ..packing import valid
from ._inputs import FEATURES, IDS, features_for, ids_for
from ._lengths import pack_padded, packed


def l1norm(X: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """X / (sum |X| + eps) along `dim`."""
    return X / (X.abs().sum(dim=dim, keepdim=True) + eps)


def l2norm(X: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """X / (sqrt(sum X^2) + eps) along `dim`.

    >>> l2norm(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    # Not pow, sum, sqrt as published: there a row of zeros, such as a region that is padding, has gradient 0 / 0.
    return X / (torch.linalg.vector_norm(X, dim=dim, keepdim=True) + eps)


def cosine(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """x . y / max(|x| |y|, eps) along the last dimension.

    >>> cosine(torch.tensor([3.0, 4.0]), torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    tensor([0.9600, 0.0000])
    """
    length = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    return (x * y).sum(-1) / length.clamp_min(eps)


def sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each caption's rows, in float32 or better: x [N, D], lengths [T] int64 -> [T, D]."""
    owner = torch.repeat_interleave(lengths, output_size=len(x))
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(len(lengths), x.shape[1], dtype=work).index_add(0, owner, x.to(work))


def without_padding(image: Tensor, region_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return image [I, R, D] with zeros beyond its `region_lengths` [I], and the mask of regions, bool [I, R].

    A NaN in the padding would otherwise make the gradients of weights NaN, as 0 x NaN.
    """
    real = valid(region_lengths, image.shape[1])
    return image.masked_fill(~rearrange(real, "i r -> i r 1"), 0.0), real


def require_regions(name: str, image: Tensor, R: int) -> None:
    """Raise unless image is [I, R, D], for a model with weights for R regions."""
    if image.dim() != 3:
        raise ValueError(f"{name}: image must be [I, R, D] with R = {R} regions, got {list(image.shape)}")
    if (given := image.shape[1]) != R:
        wanted = f"keep {R} regions of each image"
        if given < R:
            wanted = f"pad each image to {R} and give region_lengths (SPLIT_region_lengths.npy beside the features)"
        raise ValueError(
            f"{name}: image must be [I, R, D] with R = {R} regions, got {list(image.shape)}; {wanted}, or build a new "
            f"model with num_region={given} (`models.scorer`: regions)"
        )


def require_options(opt: Namespace, model: str, names: Sequence[str]) -> None:
    """Raise if the options lack one that the model reads.

    Raises:
        ValueError: names every missing option.
    """
    missing = [name for name in names if not hasattr(opt, name)]
    if missing:
        raise ValueError(f"{model}: opt lacks {', '.join(missing)}; give the options of the trained model")


def choice(model: str, name: str, value: object, known: Sequence[str]) -> None:
    """Raise if the value of an option is not one of `known`."""
    if value not in known:
        raise ValueError(f"{model}: opt.{name} must be one of {', '.join(known)}, got {value!r}")


def device_of(opt: Namespace) -> torch.device:
    """`opt.device` if it is set, else CUDA if there is a GPU, else the CPU."""
    return torch.device(getattr(opt, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: CUDA if there is a GPU, else the CPU.

    Of the processes that torchrun starts on a machine, each has the GPU of its own number. Processes of a process group
    that the program made have the GPU that torch.cuda.set_device chose, or that of their rank.

    Raises:
        ValueError: the device does not exist, or several processes would share a GPU.
    """
    try:
        chosen = device_of(Namespace(device=device))
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {device!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "cuda" and _torchrun.world() > 1:
        if chosen.index is not None:
            raise ValueError(
                f"device is {chosen}, and torchrun started {_torchrun.world()} processes, which need a GPU each; give "
                "cuda, or leave it out"
            )
        there, wanted = torch.cuda.device_count(), _torchrun.local_world()
        if wanted > there:
            raise ValueError(
                f"torchrun started {wanted} processes on this machine, and torch sees {there} CUDA devices; start at "
                "most one process for each, or give device cpu"
            )
        chosen = torch.device("cuda", _torchrun.local_rank())
    elif chosen.type == "cuda" and chosen.index is None and (rank := own_group()) is not None:
        chosen = torch.device("cuda", torch.cuda.current_device() or rank % torch.cuda.device_count())
    return chosen


class Dropout(nn.Dropout):
    """torch.nn.Dropout of rows that belong to one caption, or one image, each.

    Of a batch that is divided among processes or encoded in parts, each row gets the mask that it has in the whole
    batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        now = share()
        return super().forward(input) if now is None else now.dropout(self, input)


def encode_text(
    embedded: Tensor, lengths: Sequence[int] | Tensor, rnn: nn.GRU, no_txtnorm: bool
) -> tuple[Tensor, Tensor]:
    """Run the GRU over embedded words [B, W, E] and take the mean of its directions; unit rows unless `no_txtnorm`.

    Returns:
        [B, longest, D] with zeros beyond each length, and the lengths as an int64 CPU tensor. The captions need not be
        sorted by length.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64).cpu()
    packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    caption, lengths = pad_packed_sequence(rnn(packed)[0], batch_first=True)
    if rnn.bidirectional:
        onwards, backwards = rearrange(caption, "b w (two d) -> two b w d", two=2)
        caption = (onwards + backwards) / 2
    return caption if no_txtnorm else l2norm(caption, dim=-1), lengths


class PaddedScorer(PairScorer):
    """A pair scorer that takes captions padded, as the published modules do, or packed."""

    named = ("img_emb", "cap_emb", "cap_lens")

    def forward(  # type: ignore[override]
        self,
        img_emb: Tensor,
        cap_emb: Tensor,
        cap_lens: Sequence[int] | Tensor,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Score every image against every caption.

        Args:
            img_emb: [I, R, D], unit rows.
            cap_emb: [T, W, D], padded, unit rows; or packed words [N, D].
            cap_lens: [T] tokens per caption; with packed words, their cu_seqlens [T + 1].
            region_lengths: [I] regions of each image; None means R for all.

        Returns:
            Scores, [I, T].

        Raises:
            ValueError: a shape or length is wrong.
            TypeError: an argument is no tensor, or has a wrong dtype.
        """
        return super().forward(img_emb, *packed(type(self).__name__, cap_emb, cap_lens), region_lengths)

    def matched(  # type: ignore[override]
        self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor,
        region_lengths: Tensor | None = None, boxes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores [B] of image i with caption i alone; arguments as `forward`, and see `itm_fast.nn.PairScorer`."""
        words, cu_seqlens = packed(f"{type(self).__name__}.matched", cap_emb, cap_lens)
        return super().matched(img_emb, words, cu_seqlens, region_lengths, boxes)


@torch.no_grad()
def score_arrays(
    scorer: PairScorer,
    image: np.ndarray | Tensor,
    caption: np.ndarray | Tensor,
    lengths: Sequence[int] | Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> np.ndarray:
    """Score arrays or tensors [I, R, D] with [T, W, D] in `dtype`; return float64 [I, T], as the published evaluators
    do.

    Captions with the same bits are scored once.
    """
    from ..evaluation.distinct import first_of_equal_embeddings

    caption = torch.as_tensor(caption)
    names = type(scorer).__name__, ("caption", "lengths")
    words, cu_seqlens = pack_padded(*names, caption, lengths)
    chosen, place = np.unique(first_of_equal_embeddings(words, cu_seqlens), return_inverse=True)
    if len(chosen) < len(caption):
        some = torch.from_numpy(chosen)
        words, cu_seqlens = pack_padded(*names, caption[some.to(caption.device)], torch.as_tensor(lengths)[some])
    score = scorer(torch.as_tensor(image).to(device, dtype), words.to(device, dtype), cu_seqlens.to(device))
    return np.take(score.double().cpu().numpy(), place, axis=1)


class Matcher:
    """A model as published: one object with encoders, loss and optimizer, which is not an nn.Module."""

    parts: tuple[str, ...]  # attribute names of the modules, in the order of the checkpoint's list
    scorer_without_name = False  # whether published files name the last part's weights without the part's name
    options: tuple[str, ...] = ()  # those that the pair scorer reads
    weighs_regions = False  # whether it has weights for each region, so that R is fixed
    logger: Any = None  # the training scripts assign one with `update(name, value, n)`
    vocab_checksum: str | None = None  # of the vocabulary that it was trained with, if known
    trained_with_boxes: bool | None = None  # of models that read boxes, if known
    img_enc: nn.Module
    txt_enc: nn.Module
    optimizer: torch.optim.Optimizer
    grad_clip: float

    def __init__(self, opt: Namespace) -> None:
        self.grad_clip = opt.grad_clip
        self.device = device_of(opt)
        self.Eiters = 0

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        """Names of the options that the model needs."""
        raise NotImplementedError

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """Make the pair scorer that the options describe, without its encoders."""
        raise NotImplementedError

    @classmethod
    def scorer_options(cls, options: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `models.scorer` under this model's own names, where its scorer has others.

        Args:
            options: what the caller gave, without the direction.
            chosen: all options by default, with the direction.
        """
        return dict(options)

    def learned_options(self) -> dict[str, Any]:
        """Options that training has changed, for the checkpoint's options."""
        return {}

    def restore_learned(self, found: Mapping[str, Any]) -> None:
        """Go on from these `learned_options` of an interrupted run."""

    @property
    def modules(self) -> list[nn.Module]:
        """The modules in the order of the checkpoint's list."""
        return [getattr(self, name) for name in self.parts]

    def optimise(self, modules: Sequence[nn.Module], opt: Namespace) -> None:
        """Move the modules to the device and give their parameters, in this order, to Adam as published."""
        self.params = [p for module in modules for p in module.to(self.device).parameters()]
        self.optimizer = torch.optim.Adam(self.params, lr=opt.learning_rate)

    def state_dict(self) -> list[dict[str, Any]]:
        """One state_dict per module, as in the published checkpoints."""
        return [module.state_dict() for module in self.modules]

    def load_state_dict(self, state_dict: Sequence[Mapping[str, Any]]) -> None:
        """Load a published checkpoint's list of state_dicts.

        Raises:
            ValueError: the list has another number of modules, so it belongs to another model.
            TypeError: it is no list.
        """
        wanted = f"{type(self).__name__}: the state must be a list of {len(self.parts)} state_dicts"
        if not isinstance(state_dict, (list, tuple)):
            raise TypeError(f"{wanted}, as `state_dict()` returns it, got {type(state_dict).__name__}")
        if len(state_dict) != len(self.parts):
            raise ValueError(f"{wanted} ({', '.join(self.parts)}), got {len(state_dict)}: it belongs to another model")
        for module, state in zip(self.modules, state_dict, strict=True):
            module.load_state_dict(state)

    def train_start(self) -> None:
        """Switch to training mode."""
        for module in self.modules:
            module.train()

    def val_start(self) -> None:
        """Switch to evaluation mode."""
        for module in self.modules:
            module.eval()

    def log(self, name: str, value: float, n: int = 0) -> None:
        """Pass a value to the logger, if there is one."""
        if self.logger is not None:
            self.logger.update(name, value, n)

    def inputs(self, images: Tensor, captions: Tensor, lengths: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """What `forward_emb` is given, checked, on the model's device: features [B, R, F] and word ids [B, W]."""
        op = f"{type(self).__name__}.forward_emb"
        ids = ids_for(op, captions, lengths, self.txt_enc, self.device)
        return features_for(op, images, self.img_enc, self.device), ids

    def batch_loss(
        self, images: Tensor, captions: Tensor, lengths: Sequence[int] | Tensor, region_lengths: Tensor | None
    ) -> Tensor:
        """Loss of one batch; logs it."""
        raise NotImplementedError

    def train_emb(
        self,
        images: Tensor,
        captions: Tensor,
        lengths: Sequence[int] | Tensor,
        ids: Any = None,
        *args: Any,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """One training step.

        Args:
            images: [B, R, F] features.
            captions: [B, W] int64 word ids, padded; caption b belongs to image b.
            lengths: [B] tokens per caption.
            ids: not used, as published.
            *args: not used, as published.
            region_lengths: [B] regions of each image; None means R for all.

        Returns:
            The loss, detached, 0-d.

        Raises:
            ValueError: a shape, a length or a word id is wrong.
            TypeError: an argument is no tensor, or has a wrong dtype.
        """
        check = Arguments(f"{type(self).__name__}.train_emb")
        check.shape("images", images, FEATURES)
        check.shape("captions", captions, IDS)
        self.Eiters += 1
        self.log("Eit", self.Eiters)
        self.log("lr", self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        if region_lengths is not None:
            check.integers("region_lengths", region_lengths, Shape("B"))
            images, _ = without_padding(images, region_lengths.to(images.device))
            region_lengths = region_lengths.to(self.device)
        loss = self.batch_loss(images, captions, lengths, region_lengths)
        loss.backward()
        if self.grad_clip > 0:
            clip_grad_norm_(self.params, self.grad_clip)
        self.optimizer.step()
        return loss.detach()
