"""Every image and every caption is encoded once, and the order of the split is restored."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from itm_fast.data import Split, Vocabulary, encode_caption
from itm_fast.evaluation import encode


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.dropout = nn.Dropout(0.5)
        self.seen = 0

    def forward(self, features):
        self.seen += len(features)
        return self.dropout(self.fc(features))


class Words(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.dropout = nn.Dropout(0.5)
        self.lengths: list[list[int]] = []

    def forward(self, ids, lengths):
        self.lengths.append(lengths)
        position = torch.arange(ids.shape[1], device=ids.device)[:, None]
        caption = self.dropout(self.embed(ids)) * (1 + position)
        caption[position.squeeze(1)[None] >= torch.tensor(lengths)[:, None]] = torch.nan
        return caption, lengths


def split(images: int = 7, captions: int = 23, ragged: bool = True) -> tuple[Split, Vocabulary]:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "cat", "dog", "sits", "on"], rng.integers(1, 9))) for _ in range(captions)]
    made = Split(
        rng.standard_normal((images, 4, 6)).astype(np.float32),
        texts,
        rng.integers(0, images, captions),
        region_lengths=rng.integers(1, 5, images) if ragged else None,
    )
    return made, Vocabulary.build(texts, min_count=1)


def model(vocabulary: Vocabulary) -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(img_enc=Regions(), txt_enc=Words(len(vocabulary)))


@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_encode_is_packed_in_the_split_order(batch_size):
    data, vocabulary = split()
    net = model(vocabulary)
    found = encode(net, data, vocabulary, batch_size=batch_size, progress=False)
    net.img_enc.eval()
    torch.testing.assert_close(found.image, net.img_enc(torch.as_tensor(data.read(slice(None)))).detach())
    ids = [encode_caption(caption, vocabulary) for caption in data.captions]
    assert found.lengths.tolist() == [len(one) for one in ids]
    assert found.cu_seqlens.dtype == torch.int32
    expected = [net.txt_enc.embed(torch.tensor(one)) * (1 + torch.arange(len(one))[:, None]) for one in ids]
    torch.testing.assert_close(found.words, torch.cat(expected).detach())
    np.testing.assert_array_equal(found.caption_to_image, data.caption_to_image)
    assert found.region_lengths is not None
    assert found.region_lengths.tolist() == data.region_lengths.tolist()
    assert not found.image.requires_grad
    assert not found.words.requires_grad


def test_encode_sees_each_image_once_and_sorts_captions():
    data, vocabulary = split()
    net = model(vocabulary)
    encode(net, data, vocabulary, batch_size=4, progress=False)
    assert net.img_enc.seen == 7
    lengths = [length for batch in net.txt_enc.lengths for length in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_encode_gives_every_module_its_mode_back():
    data, vocabulary = split()
    net = model(vocabulary)
    net.img_enc.train()
    net.img_enc.dropout.eval()
    net.txt_enc.eval()
    encode(net, data, vocabulary, progress=False)
    assert net.img_enc.training
    assert not net.img_enc.dropout.training
    assert not net.txt_enc.training


def test_encode_keeps_float64():
    data, vocabulary = split()
    net = model(vocabulary)
    net.img_enc.double()
    net.txt_enc.double()
    found = encode(net, data, vocabulary, progress=False)
    assert found.image.dtype == found.words.dtype == torch.float64


def test_fingerprint_tells_inputs_apart_but_not_batches():
    data, vocabulary = split()
    net = model(vocabulary)
    first = encode(net, data, vocabulary, batch_size=128, progress=False).fingerprint
    assert encode(net, data, vocabulary, batch_size=3, progress=False).fingerprint == first
    with torch.no_grad():
        net.txt_enc.embed.weight[1, 1] += 1e-3
    assert encode(net, data, vocabulary, progress=False).fingerprint["encoders"] != first["encoders"]
    features = data.features[:]
    shapes = features, features.reshape(14, 2, 6)  # the same numbers, other images
    both = [Split(shape, data.captions, data.caption_to_image) for shape in shapes]
    prints = [encode(net, one, vocabulary, progress=False).fingerprint["features"] for one in both]
    assert prints[0] != prints[1]
    features[3, 2, 1] += 1e-3
    swapped = data.captions[-1].translate(str.maketrans("atdog", "dogat"))  # other words, as many
    vocabulary = Vocabulary.build([*data.captions, "dog cat"], min_count=1)
    assert len(swapped.split()) == len(data.captions[-1].split())
    other = Split(features, [*data.captions[:-1], swapped], data.caption_to_image)
    changed = encode(net, other, vocabulary, progress=False).fingerprint
    assert changed["features"] != first["features"]
    assert changed["captions"] != first["captions"]


def test_captions_of_the_same_ids_are_encoded_once():
    data, vocabulary = split()
    texts = [*data.captions[:5], "unheard of", "A " + data.captions[2], "heard unknown", data.captions[3].upper()]
    owner = np.arange(len(texts)) % 7
    net = model(vocabulary)
    found = encode(net, Split(data.features, texts, owner), vocabulary, batch_size=2, progress=False)
    assert found.first_of_equals is not None
    assert found.first_of_equals.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 3]
    assert sum(map(len, net.txt_enc.lengths)) == 7
    assert max(map(len, net.txt_enc.lengths)) == 2
    rows = [found.words[a:b] for a, b in zip(found.cu_seqlens[:-1], found.cu_seqlens[1:], strict=True)]
    assert torch.equal(rows[7], rows[5])
    assert torch.equal(rows[8], rows[3])
    alone = encode(net, Split(data.features, [texts[8]], np.array([0])), vocabulary, progress=False)
    torch.testing.assert_close(alone.words, rows[8])


def test_encode_refusals():
    data, vocabulary = split()
    net = model(vocabulary)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        encode(net, data, vocabulary, batch_size=0)
    with pytest.raises(ValueError, match="data has 7 features per region"):
        encode(net, Split(np.zeros((2, 3, 7), np.float32), ["a"], np.array([0])), vocabulary, progress=False)
    net.img_enc.fc = nn.Sequential(nn.Linear(6, 8), nn.Linear(9, 8))
    for known in (None, 6):
        net.img_enc.img_dim = known
        with pytest.raises(ValueError, match=r"has 6 features .* encoder does not take them \(mat1 and"):
            encode(net, data, vocabulary, progress=False)
    net = model(vocabulary)
    net.txt_enc = Words(5)
    with pytest.raises(ValueError, match="beyond the 5 words that the checkpoint embeds"):
        encode(net, data, vocabulary, progress=False)
