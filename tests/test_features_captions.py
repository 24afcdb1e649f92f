"""Files of captions: their forms, COCO's ids, and mistakes in them."""

import json
import re

import pytest

from itm_fast.features import captions

FORMS = {
    "a.csv": "image,caption\nk.jpg,a kite\nb,\"one\nball\"\n",
    "a.tsv": "id\timage\tcaption\n1\tk.jpg\ta kite\n2\tb\tone ball\n3\tb\t \n",
    "list.json": json.dumps([{"image": "k.jpg", "caption": "a kite"}, {"image": "b", "captions": ["one  ball"]}]),
    "object.json": json.dumps({"k.jpg": ["a kite"], "b": "one ball"}),
    "coco.json": json.dumps({
        "images": [{"id": 7, "file_name": "k.jpg"}, {"id": 9, "file_name": "b"}],
        "annotations": [{"image_id": 7, "caption": "a kite"}, {"image_id": 9, "caption": "one ball\n"}],
    }),
    "results.token": "k.jpg#0\ta kite\r\nb#0\tone ball \n\n",
    "dataset_mine.json": json.dumps({"dataset": "mine", "images": [
        {"filename": "k.jpg", "split": "train", "sentences": [{"raw": "a kite", "tokens": ["a", "kite"]}]},
        {"filename": "b", "split": "restval", "sentences": [{"raw": "one ball"}]},
    ]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_captions(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name], newline="")
    found, empty, ordered = captions.read_captions(tmp_path / name, "train")
    kite, ball = captions.Caption("a kite"), captions.Caption("one ball")
    assert found == {"k.jpg": [kite], "b": [ball]}
    assert empty == (name == "a.tsv")
    assert ordered == (name == "dataset_mine.json")
    assert captions.match(found, ["inner/b.png", "k.jpg"]) == ({0: [ball], 1: [kite]}, [])


@pytest.mark.parametrize(
    "name, id, known", [("val2014_0012.jpg", 12, True), ("112.jpg", 12, False), ("kite(.jpg", "kite(", False)]
)
def test_ids_are_cocos_where_the_pictures_are_named_by_them(tmp_path, name, id, known):
    content = {"images": [{"id": id, "file_name": name}], "annotations": [{"id": 3, "image_id": id, "caption": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    ((caption,),) = captions.read_captions(tmp_path / "a.json")[0].values()
    assert caption == captions.Caption("x", *((3, 12) if known else ()))


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.csv", "image;caption\nk.jpg;a kite\n", "must name the columns image and caption with a comma between them"),
        ("a.csv", "image,caption\nk.jpg,a kite, red\n", "line 2: has more columns than the first line; put quotes"),
        ("a.tsv", "image\tcaption\nk.jpg\n", "line 2: has fewer columns"),
        ("a.csv", "", "must name the columns"),
        ("a.csv", 'image,caption\nk.jpg,"a kite\n', "cannot be read as a row with quotes"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "3", "it must be a list of"),
        ("a.json", '[{"image": "k.jpg"}]', "entry 0: has no caption"),
        ("a.json", '[{"caption": "a kite"}]', "entry 0: names no image, got None"),
        ("a.json", '{"k.jpg": [5]}', "image 'k.jpg': the caption must be a text"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}', "no image with the id 5"),
        ("a.json", "[]", "holds no captions"),
        ("a.token", "k.jpg#0\ta kite\nk.jpg a kite\n", "line 2: must be NAME#NUMBER, a tab and a caption"),
        ("a.json", '{"dataset": "x", "images": [{"filename": "k.jpg"}]}', "a.json: images[0] has no `split`"),
        ("a.json", '{"dataset": "x", "images": [3]}', "a.json: images[0] has no `filename`"),
        ("a.xls", "", "captions are read from a .csv, .tsv, .json, .token or .token.txt file"),
    ],
)
def test_mistakes_in_captions_are_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        captions.read_captions(tmp_path / name)


def test_a_name_that_fits_two_pictures_is_refused():
    with pytest.raises(ValueError, match=re.escape("an image 'k', which is a/k.jpg or b/k.png")):
        captions.match({"k": [captions.Caption("a kite")]}, ["a/k.jpg", "b/k.png"])
    with pytest.raises(ValueError, match=r"'k', which is k\.npy or k\.npz; remove one of the two files"):
        captions.match({"k": [captions.Caption("a kite")]}, ["k", "k"], ["k.npy", "k.npz"])
    kite = captions.Caption("a kite")
    assert captions.match({"b/k.png": [kite]}, ["a/k.jpg", "b/k.png"]) == ({1: [kite]}, [])
