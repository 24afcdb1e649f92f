"""Encode every image and every distinct caption of a split once."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..packing import pack
from .boxes import boxes_for
from .crc import joined_crc
from .distinct import columns, first_of_equals
from .mapped import Part, Place

if TYPE_CHECKING:
    from ..data import Split, Vocabulary


_MEMORY = Place()
CaptionBatches = list[tuple[Tensor, Tensor, list[int]]]  # as itm_fast.data.caption_batches yields them


@dataclass(frozen=True, eq=False)
class Encoded:
    """The embeddings of a split, in host memory and in the split's order.

    Attributes:
        image: [I, R, D] region embeddings.
        region_lengths: int32 [I], or None when every image has R regions.
        words: [N, D] word embeddings, captions one after another.
        cu_seqlens: int32 [T + 1]; caption t is rows cu_seqlens[t] : cu_seqlens[t + 1] of `words`.
        caption_to_image: int64 [T].
        device: where the encoders ran, and where the scores will be computed.
        fingerprint: checksums of the features, the word ids and the encoders' weights, which a resumed run must share
            with the interrupted one; the embeddings themselves may differ by rounding. If it is empty, `identity`
            uses checksums of the embeddings.
        seconds: time that the encoders took.
        place: where `image` and `words` are, and the states of a scorer should be too.
        first_of_equals: int64 [T], for each caption the index of the first one with the same word ids; only that one
            is scored. None: captions are the same if their rows of `words` are, bit for bit.
        boxes: float32 [I, R, 4], if the model's scorer takes boxes and the split has them.
    """

    image: Tensor
    region_lengths: Tensor | None
    words: Tensor
    cu_seqlens: Tensor
    caption_to_image: NDArray[np.int64]
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    fingerprint: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    first_of_equals: NDArray[np.int64] | None = None
    place: Place = _MEMORY
    boxes: Tensor | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Words per caption, [T]."""
        edges = self.cu_seqlens.numpy().astype(np.int64)
        return edges[1:] - edges[:-1]

    def identity(self) -> dict[str, str]:
        """Checksums of these inputs, which a run that is resumed must share with the interrupted one.

        >>> image, bounds = torch.ones(1, 2, 3), torch.tensor([0, 1], dtype=torch.int32)
        >>> sorted(Encoded(image, torch.tensor([1]), torch.ones(1, 3), bounds, np.array([0])).identity())
        ['captions', 'images', 'region counts']
        """
        found = dict(self.fingerprint)
        if not found:
            first = () if self.first_of_equals is None else (self.first_of_equals,)
            captions = (_raw(self.words), _raw(self.cu_seqlens), *first)
            found = {"images": _checksum(_raw(self.image)), "captions": _checksum(*captions)}
        if self.region_lengths is not None:
            found["region counts"] = _checksum(_raw(self.region_lengths))
        if self.boxes is not None:
            found["boxes"] = _checksum(_raw(self.boxes))
        return found


def encode(
    model: Any,
    split: Split,
    vocab: Vocabulary,
    *,
    batch_size: int = 128,
    progress: bool = True,
    captions: CaptionBatches | None = None,
    place: Place = _MEMORY,
) -> Encoded:
    """Encode all images and all captions of a split.

    Every image is encoded once, however many captions it has, and so are captions with the same word ids. Captions
    of similar length share a batch, and the split's order is restored. The model runs in evaluation mode without
    gradients; afterwards it is in the mode that it had before.

    Args:
        model: with `img_enc(features [B, R, F]) -> [B, R, D]` and
            `txt_enc(ids [B, W] int64, lengths list[int]) -> ([B, W, D], lengths)`, such as `itm_fast.models.SGRAF`. If
            its `scorer` takes boxes, those of the split are read.
        split: as `itm_fast.data.open_split` gives it.
        vocab: the vocabulary that the model was trained with.
        batch_size: images, and captions, encoded at once.
        progress: show bars on standard error.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`, if the caller has it already.
        place: where the embeddings are kept; processes that share them divide the encoding and must all call this.

    Returns:
        `Encoded`, in the dtype of the model's parameters.

    Raises:
        ValueError: the features do not fit the image encoder; the vocabulary is not the one that the model was
            trained with (if the model has its checksum); a word id is larger than the model's vocabulary; boxes are
            no parts of the picture; or batch_size is less than 1.
        OSError: the disk has no room for the embeddings.

    >>> from types import SimpleNamespace
    >>> from itm_fast.data import Split, Vocabulary
    >>> from itm_fast.models.scan import EncoderImagePrecomp, EncoderText
    >>> model = SimpleNamespace(img_enc=EncoderImagePrecomp(6, 8), txt_enc=EncoderText(9, 5, 8, 1))
    >>> split = Split(np.zeros((2, 3, 6), np.float32), ["a cat", "one dog", "a dog"], np.array([0, 1, 1]))
    >>> found = encode(model, split, Vocabulary.build(split.captions, min_count=1), progress=False)
    >>> found.image.shape, found.words.shape, found.lengths
    (torch.Size([2, 3, 8]), torch.Size([12, 8]), array([4, 4, 4]))
    """
    from ..data import caption_batches

    if batch_size < 1:
        raise ValueError(f"encode: batch_size must be at least 1, got {batch_size}")
    require_vocabulary(model, vocab)
    start = time.perf_counter()
    boxes = boxes_for(model, split)
    if captions is None:
        captions = list(caption_batches(split.captions, vocab, batch_size))
    ids, edges = packed_ids(captions)
    first = first_of_equals(ids, edges)
    with evaluation_mode(model.img_enc, model.txt_enc), torch.no_grad():
        image, features = _images(model.img_enc, split, batch_size, place, progress)
        words = _captions(model.txt_enc, ids, edges, first, batch_size, image.dtype, progress, place)
    lengths = split.region_lengths
    return Encoded(
        image=image,
        region_lengths=None if lengths is None else torch.as_tensor(np.asarray(lengths, np.int32)),
        words=words,
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        caption_to_image=np.asarray(split.caption_to_image, np.int64),
        device=device_of(model.img_enc),
        fingerprint={
            "features": features,
            "captions": _checksum(edges, ids),
            "encoders": weights_checksum(model.img_enc, model.txt_enc),
        },
        seconds=time.perf_counter() - start,
        first_of_equals=first,
        place=place,
        boxes=boxes,
    )


def encode_captions(
    model: Any, captions: Sequence[str], vocab: Vocabulary, *, batch_size: int = 128
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Encode captions alone, as `encode` does.

    Args:
        model, vocab, batch_size: as for `encode`.
        captions: T texts.

    Returns:
        `words`, `cu_seqlens` and `first_of_equals`, as `Encoded` has them.

    Raises:
        ValueError: as `encode`.
    """
    from ..data import caption_batches

    require_vocabulary(model, vocab)
    ids, edges = packed_ids(list(caption_batches(captions, vocab, batch_size)))
    first = first_of_equals(ids, edges)
    with evaluation_mode(model.txt_enc), torch.no_grad():
        words = _captions(model.txt_enc, ids, edges, first, batch_size, _dtype(model.txt_enc), False)
    return words, torch.from_numpy(edges.astype(np.int32)), first


def require_vocabulary(model: Any, vocab: Vocabulary) -> None:
    """Refuse what is no model, no vocabulary, and one of another checksum than the model's `vocab_checksum`, if any."""
    if not hasattr(model, "img_enc"):
        of = "load it with itm_fast.models.load(path) and give .model"
        if not isinstance(model, (str, os.PathLike)):
            of = "of what itm_fast.models.load returns give .model"
        raise TypeError(f"model must have img_enc, txt_enc and scorer, got {type(model).__name__}; {of}")
    if vocab is None:
        raise ValueError(
            "vocab is None; captions become word ids by the vocabulary that the model was trained with, so load the "
            "model with it: itm_fast.models.load(path, vocab=FILE)"
        )
    if not hasattr(vocab, "checksum"):
        raise TypeError(
            f"vocab must be a Vocabulary, got {type(vocab).__name__}; read one with itm_fast.data.Vocabulary.load(FILE)"
        )
    if getattr(model, "vocab_checksum", None) not in (None, vocab.checksum()):
        raise ValueError(
            f"the {type(model).__name__} model was trained with other words than the {len(vocab):,} of this "
            "vocabulary, so the captions would get wrong word ids; give the vocabulary that it was trained with"
        )


def packed_ids(captions: CaptionBatches) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Word ids [N], captions one after another in the split's order, and the bounds [T + 1] of the captions.

    >>> packed_ids([(torch.tensor([1, 0]), torch.tensor([[1, 7, 2], [1, 2, 0]]), [3, 2])])
    (array([1, 2, 1, 7, 2]), array([0, 2, 5]))
    """
    edges = np.zeros(sum(len(lengths) for _, _, lengths in captions) + 1, np.int64)
    for index, _, lengths in captions:
        edges[1:][index.numpy()] = lengths
    edges = np.cumsum(edges)
    packed = np.empty(edges[-1], np.int64)
    for index, ids, lengths in captions:
        packed[word_rows(edges, index.numpy())] = ids.numpy()[np.arange(ids.shape[1]) < np.array(lengths)[:, None]]
    return packed, edges


def word_rows(edges: NDArray[np.int64], captions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers of these captions' words among the packed words, in the order of `captions`.

    >>> word_rows(np.array([0, 2, 5, 6]), np.array([2, 0]))
    array([5, 0, 1])
    """
    lengths = edges[captions + 1] - edges[captions]
    before = np.cumsum(lengths) - lengths
    return np.repeat(edges[captions] - before, lengths) + np.arange(int(lengths.sum()))


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and every submodule back into its own mode afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def device_of(*modules: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of these modules; the CPU if they have none."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def weights_checksum(*modules: nn.Module) -> str:
    """Checksum of all parameters and buffers, and of the modules' configuration as `repr` shows it."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return _checksum(*map(_raw, tensors), np.frombuffer("".join(map(repr, modules)).encode(), np.uint8))


def _raw(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _checksum(*arrays: NDArray) -> str:
    value = 0
    for array in arrays:
        value = _crc(array, _crc_of_shape(array.shape, value))
    return f"{value:08x}"


def _crc(array: NDArray, value: int) -> int:
    """The CRC-32 of an array's bytes, continued from `value`, the CRC-32 of the bytes before."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data, value)


def _crc_of_shape(shape: tuple[int, ...], value: int) -> int:
    return zlib.crc32(repr(shape).encode(), value)


def embed(encoder: nn.Module, features: NDArray[np.float32]) -> Tensor:
    """Features [B, R, F] through the image encoder, in its dtype and on its device.

    Raises:
        ValueError: the encoder takes another feature size.
    """
    try:
        return encoder(torch.as_tensor(features).to(device_of(encoder), _dtype(encoder)))
    except RuntimeError as error:
        if "shapes cannot be multiplied" not in str(error):
            raise
        given, known = features.shape[2], getattr(encoder, "img_dim", None)
        takes = f"does not take them ({error})" if known in (None, given) else f"takes {known}"
        raise ValueError(
            f"the data has {given} features per region, and the checkpoint's image encoder {takes}; use the features "
            "that it was trained on"
        ) from error


def _images(encoder: nn.Module, split: Split, batch_size: int, place: Place, progress: bool) -> tuple[Tensor, str]:
    from tqdm import tqdm

    count = len(split.features)
    checksums: dict[int, tuple[int, int]] = {}  # of each batch of features, and its bytes
    with tqdm(total=count, desc="images", unit="image", disable=not progress) as bar:

        def produce(step: int) -> list[Part]:
            rows = slice(step * batch_size, min((step + 1) * batch_size, count))
            features = split.read(rows)
            checksums[step] = _crc(features, 0), features.nbytes
            embedded = embed(encoder, features)
            bar.update(rows.stop - bar.n)  # other processes have come about as far
            return [(rows, embedded)]

        (image,) = place.fill(-(-count // batch_size), produce, lambda _: [count])
        bar.update(count - bar.n)
    every = {step: found for part in place.node.each(checksums) for step, found in part.items()}
    checksum = 0
    for step in sorted(every):
        checksum = joined_crc(checksum, *every[step])
    return image, f"{_crc_of_shape((count, *split.features.shape[1:]), checksum):08x}"


def _captions(
    encoder: nn.Module,
    ids: NDArray[np.int64],
    edges: NDArray[np.int64],
    first: NDArray[np.int64],
    batch_size: int,
    dtype: torch.dtype,
    progress: bool,
    place: Place = _MEMORY,
) -> Tensor:
    from tqdm import tqdm

    device = device_of(encoder)
    known = getattr(getattr(encoder, "embed", None), "num_embeddings", None)
    if known is not None and len(ids) and ids.max() >= known:
        raise ValueError(
            f"encode: word id {ids.max()} lies beyond the {known} words that the checkpoint embeds; use "
            "the vocabulary that it was trained with"
        )
    order, column = columns(first, edges[1:] - edges[:-1])
    by_column = np.argsort(column, kind="stable")  # all captions, equal ones beside each other
    in_order = column[by_column]
    with tqdm(total=len(order), desc="captions", unit="caption", disable=not progress) as bar:

        def produce(step: int) -> list[Part]:
            start = step * batch_size
            chosen = order[start : start + batch_size]
            lengths, rows = edges[chosen + 1] - edges[chosen], word_rows(edges, chosen)
            batch = np.zeros((len(chosen), lengths[0]), np.int64)
            batch[np.arange(lengths[0]) < lengths[:, None]] = ids[rows]
            padded = encoder(torch.from_numpy(batch).to(device), lengths.tolist())
            padded = padded if isinstance(padded, Tensor) else padded[0]  # SCAN's encoder also returns the lengths
            words = pack(padded, lengths.tolist())[0].to("cpu", dtype)
            stop = start + len(chosen)
            bar.update(stop - bar.n)  # other processes have come about as far
            equal = by_column[slice(*np.searchsorted(in_order, [start, stop]))]
            source = word_rows(np.concatenate([[0], np.cumsum(lengths)]), column[equal] - start)
            return [(torch.from_numpy(word_rows(edges, equal)), words[torch.from_numpy(source)])]

        (words,) = place.fill(-(-len(order) // batch_size), produce, lambda _: [len(ids)])
        bar.update(len(order) - bar.n)
    return words


def _dtype(encoder: nn.Module) -> torch.dtype:
    return next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
