"""What models refuse to encode and to train on, in a sentence that names the argument."""

from pathlib import Path

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast.data import Split, Vocabulary
from itm_fast.models import Loaded, naaf

R, D = 6, 16
IMAGES, IDS, LENGTHS = torch.ones(2, R, D), torch.ones(2, 3, dtype=torch.int64), [3, 2]


def model_of(name, words=9):
    opt = itm_fast.training.options(name, img_dim=D, embed_size=D, word_dim=D)
    opt.vocab_size = words
    return itm_fast.models.build(opt)


IDS_IN, LENGTHS_IN = (
    r"captions must hold word ids in 0\.\.8 \(vocab_size 9\), got",
    r"lengths must lie in 1\.\.3 \(W of",
)
WRONG = {
    "double": (
        (IMAGES.double(), IDS, LENGTHS),
        TypeError,
        "images and the weights must have one dtype, got torch.float",
    ),
    "array": ((IMAGES.numpy(), IDS, LENGTHS), TypeError, "images must be a tensor, got ndarray"),
    "one-image": ((IMAGES[0], IDS, LENGTHS), ValueError, r"images must be \[B, R, F\], got "),
    "meta": ((IMAGES.to("meta"), IDS, LENGTHS), ValueError, "images must hold values, got a tensor on the meta"),
    "F": ((IMAGES[:, :, 1:], IDS, LENGTHS), ValueError, rf"images must be \[B, R, F\] with F = {D} \(img_dim\), got "),
    "no-captions": ((IMAGES[:0], IDS[:0], []), ValueError, r"captions must be \[B, W\] with B > 0, got \[0, 3\]"),
    "list": ((IMAGES, IDS.tolist(), LENGTHS), TypeError, "captions must be a tensor, got list"),
    "float-ids": ((IMAGES, IDS.float(), LENGTHS), TypeError, "captions must be int32 or int64, got torch.float32"),
    "one-caption": ((IMAGES, IDS[0], LENGTHS), ValueError, r"captions must be \[B, W\], got \[3\]"),
    "large-ids": ((IMAGES, IDS + 8, LENGTHS), ValueError, f"{IDS_IN} 9..9; use the vocabulary"),
    "negative-ids": ((IMAGES, IDS - 2, LENGTHS), ValueError, f"{IDS_IN} -1..-1; use the vocabulary"),
    "empty-caption": ((IMAGES, IDS, [3, 0]), ValueError, f"{LENGTHS_IN} captions.*, got 0..3"),
    "negative": ((IMAGES, IDS, [3, -1]), ValueError, f"{LENGTHS_IN} captions.*, got -1..3"),
    "long": ((IMAGES, IDS, torch.tensor([4, 2])), ValueError, f"{LENGTHS_IN} captions.*, got 2..4"),
    "half": ((IMAGES, IDS, [2.5, 2]), ValueError, "lengths must be whole numbers, got 2.5"),
    "meta-lengths": (
        (IMAGES, IDS, torch.tensor([3, 2], device="meta")),
        TypeError,
        r"lengths must be \[B\] whole numbers, got tensor\(.*device='meta'",
    ),
    "one-length": ((IMAGES, IDS, [3]), ValueError, r"lengths must be \[B\] with B = 2 as in captions, got \[1\]"),
    "none": ((IMAGES, IDS, None), TypeError, r"lengths must be \[B\] whole numbers, got None"),
    "text": ((IMAGES, IDS, "ab"), TypeError, r"lengths must be \[B\] whole numbers, got 'ab'"),
}


@pytest.mark.parametrize("given,error,said", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["dual", "scan", "imram"])
def test_a_model_refuses_wrong_input_by_name(name, given, error, said):
    model = model_of(name)
    with pytest.raises(error, match=rf"^{type(model).__name__}\.forward_emb: {said}"):
        model.forward_emb(*given)
    with pytest.raises(error, match=rf"^{type(model).__name__}\.(train_emb|forward_emb): {said}"):
        model.train_emb(*given)


class Mixed(torch.nn.Module):
    """An image encoder of a user's own: its `fc` reads neither the features' size nor their dtype."""

    def __init__(self):
        super().__init__()
        self.fc, self.body = torch.nn.Linear(12, D).bfloat16(), torch.nn.Linear(D, 12).double()

    def forward(self, images):
        return self.fc(self.body(images.double()).bfloat16()).float()


def test_what_an_image_encoder_of_ones_own_takes_is_its_own_affair():
    model = model_of("dual")
    model.img_enc = Mixed()
    assert model.forward_emb(IMAGES, IDS, LENGTHS)[0].shape == (2, R, D)
    with pytest.raises(ValueError, match=r"^DualEncoder\.forward_emb: images must be \[B, R, F\], got \["):
        model.forward_emb(IMAGES[0], IDS, LENGTHS)


class Hashed(torch.nn.Module):
    """A text encoder of a user's own: words share the rows of `embed`."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, D)

    def forward(self, captions, lengths):
        return self.embed(captions % 4), torch.tensor(lengths)


def test_which_word_ids_a_text_encoder_of_ones_own_takes_is_its_own_affair():
    model = model_of("dual")
    model.txt_enc = Hashed()
    model.forward_emb(IMAGES, 7 * IDS, LENGTHS)


def test_word_ids_are_those_of_the_table_that_the_encoder_has_now():
    model = model_of("dual")
    model.txt_enc.embed = torch.nn.Embedding(20, D)  # a vocabulary that has grown
    model.forward_emb(IMAGES, 19 * IDS, LENGTHS)
    with pytest.raises(ValueError, match=r"word ids in 0\.\.19 \(vocab_size 20\), got 20\.\.20"):
        model.forward_emb(IMAGES, 20 * IDS, LENGTHS)
    model.txt_enc = naaf.GloveRNNEncoder(9, D, D)
    with pytest.raises(ValueError, match=r"word ids in 0\.\.8 \(vocab_size 9\), got 9\.\.9"):
        model.forward_emb(IMAGES, 9 * IDS, LENGTHS)


def test_a_training_step_refuses_another_number_of_captions():
    said = r"^DualEncoder\.train_emb: captions must be \[B, W\] with B = 2 as in images, got \[1, 3\]$"
    with pytest.raises(ValueError, match=said):
        model_of("dual").train_emb(IMAGES, IDS[:1], [3])


@pytest.mark.parametrize("state", [None, {"model": 1}], ids=["none", "dict"])
def test_a_state_that_is_no_list_is_refused(state):
    said = rf"^SCAN: the state must be a list of 2 state_dicts, .* got {type(state).__name__}$"
    with pytest.raises(TypeError, match=said):
        model_of("scan").load_state_dict(state)


def test_what_is_no_model_is_refused_with_the_attribute_that_is_one():
    vocab = Vocabulary.build(["a cat"], min_count=1)
    model = model_of("scan", len(vocab))
    model.val_start()
    loaded, features = Loaded(model, vocab, "SCAN"), IMAGES.numpy()
    split = Split(features, ["a cat", "a cat"], np.array([0, 1]))
    for call in (
        lambda: itm_fast.evaluation.score(loaded, features, ["a cat"], vocab),
        lambda: itm_fast.evaluation.evaluate(loaded, split, vocab),
        lambda: itm_fast.attention(loaded, features[0], "a cat", vocab),
    ):
        with pytest.raises(TypeError, match=r"got Loaded; of what itm_fast\.models\.load returns give \.model$"):
            call()
    for call in (
        lambda: itm_fast.evaluation.evaluate(model, split, None),
        lambda: itm_fast.attention(model, features[0], "a cat", None),
    ):
        with pytest.raises(ValueError, match=r"vocab is None; .*itm_fast\.models\.load\(path, vocab=FILE\)$"):
            call()
    for path in ("m.tar", Path("m.tar")):
        said = r"^model must have .* got (str|PosixPath); load it with itm_fast\.models\.load\(path\) and give \.model$"
        with pytest.raises(TypeError, match=said):
            itm_fast.evaluation.score(path, features, ["a cat"], vocab)
    with pytest.raises(ValueError, match=r"^score: there are no captions$"):
        itm_fast.evaluation.score(model, features, [], vocab)


@pytest.mark.parametrize("wrong", [None, 5], ids=repr)
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(TypeError, match=f"^load: path must be a string or a path, got {wrong}$"):
        itm_fast.models.load(wrong)
    with pytest.raises(TypeError, match=f"^open_split: path must be a string or a path, got {wrong}$"):
        itm_fast.data.open_split(wrong, "dev")


@pytest.mark.parametrize(
    "image,caption,error,said",
    [
        (IMAGES[0][:, 1:], "a cat", ValueError, rf"image must be \[B, R, F\] with F = {D} \(img_dim\), got"),
        (IMAGES[0].to("meta"), "a cat", ValueError, "image must hold values"),
        (IMAGES[0], ["a cat"], TypeError, "caption must be one text, got list"),
    ],
    ids=["F", "meta", "list"],
)
def test_attention_refuses_wrong_input_by_name(image, caption, error, said):
    vocab = Vocabulary.build(["a cat"], min_count=1)
    model = model_of("scan", len(vocab))
    model.val_start()
    with pytest.raises(error, match=f"^attention: {said}"):
        itm_fast.attention(model, image, caption, vocab)


def test_attention_takes_features_of_any_dtype_and_a_model_of_any():
    vocab = Vocabulary.build(["a cat"], min_count=1)
    model = model_of("scan", len(vocab))
    model.val_start()
    for part in model.modules:
        part.bfloat16()
    assert itm_fast.attention(model, IMAGES[0].double(), "a cat", vocab).weights["regions"].dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", ["1", None, 0, float("nan")], ids=repr)
def test_bounds_on_memory_that_are_no_positive_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^workspace: gib must be more than 0, got "), itm_fast.workspace(wrong):
        pass
    if wrong is not None:  # which lets evaluation choose
        said = rf"^the memory budget must be a number more than 0 GB and at most .* got {wrong!r}$"
        with pytest.raises(ValueError, match=said):
            itm_fast.evaluation.plan(
                itm_fast.nn.CrossAttentionScore(), images=2, regions=R, dim=D, lengths=np.ones(2, int), memory_gb=wrong
            )


@pytest.mark.parametrize("wrong", [[2, 3], torch.tensor([2, 3, 3])], ids=["list", "three"])
def test_a_training_step_refuses_wrong_region_lengths(wrong):
    model = model_of("dual")
    with pytest.raises((TypeError, ValueError), match=r"^DualEncoder\.train_emb: region_lengths must be "):
        model.train_emb(torch.ones(2, R, D), torch.ones(2, 3, dtype=torch.int64), [3, 2], region_lengths=wrong)
