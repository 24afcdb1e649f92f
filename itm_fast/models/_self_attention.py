"""SGRAF's global vectors of images and captions (section 3.1 of the paper, as in the published code).

    a = softmax(w . (h(locals) o g(their mean))),   global vector = l2norm(sum a local)

with h and g a Linear, a tanh and a dropout; images have a BatchNorm before the tanh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from .._share import share
from .._workspace import scratch_bytes
from ..nn import State, xavier_
from ..packing import bounds, spans, valid
from ._common import Dropout, PaddedScorer, l2norm, require_regions, sums, without_padding
from ._rows import linear

LEAST = 16  # a caption's logits are padded to this number, as torch's softmax over fewer rounds differently


class _Linear(nn.Linear):
    """torch.nn.Linear by `_rows.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _embedding(embed_dim: int, channels: int, dropout_rate: float) -> nn.Sequential:
    norm = [nn.BatchNorm1d(channels)] if channels else []
    return nn.Sequential(_Linear(embed_dim, embed_dim), *norm, nn.Tanh(), Dropout(dropout_rate))


class _SelfAttention(nn.Module):
    """The parameters, and the weighted sum of padded locals."""

    def __init__(self, embed_dim: int, dropout_rate: float, local_channels: int, global_channels: int) -> None:
        super().__init__()
        self.embedding_local = _embedding(embed_dim, local_channels, dropout_rate)
        self.embedding_global = _embedding(embed_dim, global_channels, dropout_rate)
        self.embedding_common = nn.Sequential(_Linear(embed_dim, 1))
        for embedding in (self.embedding_local, self.embedding_global, self.embedding_common):
            xavier_(cast(nn.Linear, embedding[0]))

    def pooled(self, local: Tensor, l_emb: Tensor, g_emb: Tensor, valid: Tensor | None = None) -> Tensor:
        """l2norm of the weighted sum of `local` [B, L, D]; rows not `valid` [B, L] have no weight."""
        logits = self.embedding_common(l_emb * rearrange(g_emb, "b d -> b 1 d"))
        weights = rearrange(logits, "b l 1 -> b l")
        if valid is not None:
            weights = weights.masked_fill(~valid, float("-inf"))
        weights = weights.softmax(1).to(local.dtype)
        return l2norm(reduce(rearrange(weights, "b l -> b l 1") * local, "b l d -> b d", "sum"))


class VisualSA(_SelfAttention):
    """Global image vectors. The BatchNorm of the regions has the region index as channel, so R is fixed.

    Args:
        embed_dim: D.
        dropout_rate: of both dropouts.
        num_region: R.

    >>> region = torch.randn(2, 36, 8)
    >>> VisualSA(8, 0.4, 36)(region, region.mean(1)).shape
    torch.Size([2, 8])
    """

    def __init__(self, embed_dim: int, dropout_rate: float, num_region: int) -> None:
        super().__init__(embed_dim, dropout_rate, num_region, embed_dim)

    def forward(self, local: Tensor, raw_global: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool regions.

        Args:
            local: [B, R, D]; finite in every row.
            raw_global: [B, D], the mean of the regions.
            valid: [B, R] bool, the rows that are regions; None means all.

        Returns:
            [B, D], unit rows.
        """
        linear, norm, tanh, dropout = self.embedding_local
        l_emb = dropout(tanh(normalised(norm, linear(local), valid)))
        linear, norm, tanh, dropout = self.embedding_global
        g_emb = dropout(tanh(normalised(norm, linear(raw_global))))
        return self.pooled(local, l_emb, g_emb, valid)


def normalised(norm: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """BatchNorm1d over [B, C] or [B, C, L]; in training its statistics are over the valid rows of the whole batch.

    Args:
        norm: the BatchNorm1d of C channels.
        x: of this process's images.
        valid: [B, C] bool; None means all.
    """
    now = share()
    divided = now is not None and now.divided
    if not norm.training or (valid is None and not divided):
        return norm(x)
    if valid is None:
        valid = x.new_ones(x.shape[:2], dtype=torch.bool)
    rows = x if x.dim() == 3 else rearrange(x, "b c -> b c 1")
    total = now.ranks.sum if now is not None and divided else _itself
    return _masked_batch_norm(cast(nn.BatchNorm1d, norm), rows, valid, total).view_as(x)


def _itself(x: Tensor) -> Tensor:
    return x


def _masked_batch_norm(norm: nn.BatchNorm1d, x: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """BatchNorm1d in training mode over [B, R, D] with R as channel; statistics are over the valid rows of a channel.

    `total` adds up a tensor [R] over the processes that have a part of the batch. The running statistics of a channel
    without a valid row stay as they are.
    """
    real = rearrange(valid, "b r -> b r 1")
    count = total((valid.sum(0) * x.shape[2]).to(x.dtype))  # [R]
    mean = total(reduce(x.masked_fill(~real, 0.0), "b r d -> r", "sum")) / count.clamp_min(1)
    centred = (x - rearrange(mean, "r -> r 1")).masked_fill(~real, 0.0)
    var = total(reduce(centred.square(), "b r d -> r", "sum")) / count.clamp_min(1)
    with torch.no_grad():
        unbiased = var * (count / (count - 1).clamp_min(1))
        for name, new in (("running_mean", mean), ("running_var", unbiased)):
            running = norm.get_buffer(name)
            running.lerp_(new.to(running), cast(float, norm.momentum) * (count > 0).to(running))
        norm.get_buffer("num_batches_tracked").add_(1)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return centred * rearrange(scale, "r -> r 1") + rearrange(norm.bias, "r -> r 1")


class TextSA(_SelfAttention):
    """Global caption vectors.

    Args:
        embed_dim: D.
        dropout_rate: of both dropouts.

    >>> word = torch.randn(2, 7, 8)
    >>> TextSA(8, 0.4)(word, word.mean(1)).shape
    torch.Size([2, 8])
    """

    def __init__(self, embed_dim: int, dropout_rate: float) -> None:
        super().__init__(embed_dim, dropout_rate, 0, 0)

    def forward(self, local: Tensor, raw_global: Tensor) -> Tensor:
        """Pool words [B, L, D] of captions of one length, with their mean [B, D], to unit rows [B, D]."""
        return self.pooled(local, self.embedding_local(local), self.embedding_global(raw_global))

    def packed(self, words: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Pool the words of every caption: words [N, D], cu_seqlens [T + 1] -> unit rows [T, D].

        In training the dropouts are drawn caption by caption, words first, so that the random stream is that
        of one `forward` per caption.
        """
        lengths = cu_seqlens.diff().long()
        if not len(lengths):
            return words
        owner = torch.repeat_interleave(lengths, output_size=len(words))  # [N], the caption of each word
        linear, tanh, _ = self.embedding_local
        l_emb = tanh(linear(words))
        linear, tanh, _ = self.embedding_global
        g_emb = tanh(linear((sums(words, lengths) / lengths[:, None]).to(words.dtype)))
        if self.training:
            l_emb, g_emb = self._dropped(l_emb, g_emb, lengths.tolist())
        logits = rearrange(self.embedding_common(l_emb * g_emb[owner]), "n 1 -> n")
        longest = max(LEAST, int(lengths.max()))
        real = valid(lengths, longest)  # [T, W]
        padded = logits.new_full(real.shape, float("-inf"))
        padded[real] = logits
        weights = padded.softmax(1)[real]
        return l2norm(sums(rearrange(weights, "n -> n 1") * words, lengths).to(words.dtype), dim=-1)

    def in_parts(self, words: Tensor, cu_seqlens: Tensor, name: str) -> Tensor:
        """`packed`, in evaluation for some captions at a time, so that its temporaries fit the workspace; `name` is
        what errors name."""
        if torch.is_grad_enabled() or self.training:
            return self.packed(words, cu_seqlens)
        edge = bounds(cu_seqlens, len(words), name)
        longest = int(cu_seqlens.diff().max()) if len(edge) > 1 else 1
        size = max(1, scratch_bytes(words.device) // (6 * longest * words[:1].nbytes or 1))
        parts = [
            self.packed(words[edge[at.start] : edge[at.stop]], cu_seqlens[at.start : at.stop + 1])
            for at in spans(len(edge) - 1, size)
        ]
        return torch.cat(parts) if parts else words

    def _dropped(self, l_emb: Tensor, g_emb: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Both embeddings after their dropouts, drawn in the shapes and order of the published loop.

        Of a batch that is divided among processes, each draws for all captions, and takes the masks of its own.
        """
        now = share()
        drawn, mine = (lengths, range(len(lengths))) if now is None else (now.lengths, now.rows)
        l_drop, g_drop = (cast(nn.Dropout, part[2]) for part in (self.embedding_local, self.embedding_global))
        l_masks, g_masks = [], []
        for t, n in enumerate(drawn):
            l_mask = nn.functional.dropout(l_emb.new_ones(1, n, l_emb.shape[1]), l_drop.p, l_drop.training)[0]
            g_mask = nn.functional.dropout(g_emb.new_ones(1, g_emb.shape[1]), g_drop.p, g_drop.training)
            if t in mine:
                l_masks.append(l_mask)
                g_masks.append(g_mask)
        return l_emb * torch.cat(l_masks), g_emb * torch.cat(g_masks)


class GlobalVectors(PaddedScorer):
    """A pair scorer whose states are the global vectors of images and captions.

    Args:
        embed_size: D.
        num_region: R.
        dropout_rate: of both self-attentions.
    """

    def __init__(self, embed_size: int, num_region: int = 36, dropout_rate: float = 0.4) -> None:
        super().__init__()
        self.v_global_w = VisualSA(embed_size, dropout_rate, num_region)
        self.t_global_w = TextSA(embed_size, dropout_rate)

    def check_regions(self, image: Tensor) -> None:
        """Raise if the images have another number of regions than the weights."""
        require_regions(type(self).__name__, image, cast(int, self.v_global_w.embedding_local[1].num_features))

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None) -> State:
        """The image and its global vector: image [I, R, D] -> [I, R, D], [I, D]."""
        self.check_regions(image)
        if torch.is_grad_enabled() or self.v_global_w.training:
            return image, self._image_global(image, region_lengths)
        size = max(1, scratch_bytes(image.device) // (4 * image[:1].nbytes or 1))
        parts = [
            self._image_global(image[at], None if region_lengths is None else region_lengths[at])
            for at in spans(len(image), size)
        ]
        return image, torch.cat(parts) if parts else image.new_empty(0, image.shape[2])

    def _image_global(self, image: Tensor, region_lengths: Tensor | None) -> Tensor:
        if region_lengths is None:
            return self.v_global_w(image, image.mean(1))
        image, valid = without_padding(image, region_lengths)
        return self.v_global_w(image, image.sum(1) / region_lengths[:, None], valid)

    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """The captions' global vectors: words [N, D] -> [T, D]."""
        return (self.t_global_w.in_parts(words, cu_seqlens, type(self).__name__),)
