"""`itm-fast features`: splits from pictures, arrays and files of captions; and the guide's commands, on tiny data."""

import contextlib
import functools
import json
import os
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itm_fast import training
from itm_fast.cli import main
from itm_fast.cli._pictures import pictures_of
from itm_fast.data import Vocabulary, open_split
from itm_fast.features import backbones, detectors, pictures

GUIDE = Path(__file__).resolve().parents[1] / ".github" / "GUIDE.md"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
NORMALISED = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Tiny(torch.nn.Module):
    """A backbone as timm makes them: the mean of 4 x 4 pixels, in six channels."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 4, stride=4)
        self.fc = torch.nn.Identity()

    def forward_features(self, image):
        return self.conv(image)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """A module with the functions of timm that are called; `made` lists the models that it made."""
    module = types.ModuleType("timm")
    module.made = []
    module.is_model = lambda name: name.startswith(("resnet50", "tiny"))
    module.create_model = lambda name, **options: module.made.append(options) or Tiny()
    settings = {"input_size": (3, 32, 32), "mean": NORMALISED[0], "std": NORMALISED[1]}
    module.data = types.SimpleNamespace(resolve_model_data_config=lambda model: settings)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures with two captions each, also two folders deep and with a space in the name."""
    monkeypatch.chdir(tmp_path)
    rows = ["image,caption"]
    for split, count in (("train", 12), ("dev", 5), ("test", 6)):
        (tmp_path / "pictures" / split / "more").mkdir(parents=True)
        for number in range(count):
            colour = list(COLOURS)[number % 4]
            name = f"more/{split} {number}.png" if number == 1 else f"{split}{number}.jpg"
            Image.new("RGB", (40, 30), COLOURS[colour]).save(tmp_path / "pictures" / split / name)
            rows += [f"{name.split('/')[-1]},a {colour} square", f'{name},"{colour}, all over"']
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def features(*words, captions="captions.csv", split="test", source=("--backbone", "timm:tiny"), images=None):
    images = images or f"pictures/{split}"
    if "--backbone" in source:
        source += ("--grid", "4", "--weights", "random")
    given = ["--split", split, "--captions", captions, *source, "--no-progress", *words]
    return main(["features", images, "data", *given])


def test_a_split_of_pictures(folder, capsys):
    assert features() == 0
    out, err = capsys.readouterr()
    assert out == "data: test, 6 images of 16 regions x 6 features, 12 captions\n"
    assert "of 19 images named in the captions there is no file" in err
    split = open_split("data", "test")
    names = (folder / "data/test_pictures.txt").read_text().splitlines()
    assert names == ["more/test 1.png\t", "test0.jpg", "test2.jpg", "test3.jpg", "test4.jpg", "test5.jpg"]
    assert split.captions[:3] == ["a green square", "green, all over", "a red square"]
    assert split.caption_to_image.tolist() == np.arange(6).repeat(2).tolist()
    boxes = split.boxes[:]
    assert boxes[5, 6].tolist() == [0.5, 0.25, 0.75, 0.5]  # row 1, column 2 of 4
    # All pixels of a picture are the same, so each region is the network's answer to its colour.
    backbone = backbones.load("timm:tiny", "random")
    pixels = np.tile(np.array(COLOURS["green"], np.uint8), (1, 32, 32, 1))
    wanted = backbone.map(pixels)[0, :, 0, 0].numpy()
    assert split.features[:1][0] == pytest.approx(np.tile(wanted, (16, 1)), abs=1e-5)
    assert not list(folder.glob("data/.*"))
    small = pictures_of("pictures/test", "data", "test", split)
    assert all(small(row) for row in range(6))  # also that with a space in its name
    assert features() == 2
    assert "test_ims.npy exists already" in capsys.readouterr().err


def test_regions_lie_where_their_boxes_say():
    white = np.zeros((1, 28, 28, 3), np.uint8)
    white[0, 4:8, 20:24] = 255  # of the map [7, 7] row 1, column 5
    maps = torch.from_numpy(white[:, ::4, ::4]).permute(0, 3, 1, 2).float()
    found = backbones.regions(maps, 3)[0].sum(1) > 0
    centre = np.array([5.5, 1.5]) / 7
    boxes = backbones.cells(7, 7, 3)
    assert found.tolist() == [bool((box[:2] < centre).all() and (centre < box[2:]).all()) for box in boxes]
    with pytest.raises(ValueError, match="too few for --grid 8"):
        backbones.cells(7, 7, 8)


def test_an_interrupted_command_goes_on(folder, capsys, monkeypatch):
    done = []
    whole = backbones.Backbone.map

    def interrupted(self, pixels):
        done.append(len(pixels))
        if len(done) == 4:  # the first call finds the shape of the map
            raise KeyboardInterrupt
        return whole(self, pixels)

    monkeypatch.setattr(backbones.Backbone, "map", interrupted)
    assert features("--batch-size", "2") == 130
    assert "4 of 6 images are kept" in capsys.readouterr().err
    assert not (folder / "data/test_ims.npy").exists()
    assert features("--batch-size", "2", "--half") == 2
    assert "an interrupted command made with another precision; give" in capsys.readouterr().err
    picture = folder / "pictures/test/test5.jpg"
    content, was = picture.read_bytes(), picture.stat()
    picture.unlink()
    assert features("--batch-size", "2") == 2
    assert "an interrupted command made with 6 images, now 5; give" in capsys.readouterr().err
    picture.write_bytes(content + b" ")
    assert features("--batch-size", "2") == 2
    assert "made with other images, or before one of them changed" in capsys.readouterr().err
    picture.write_bytes(content)
    os.utime(picture, ns=(was.st_atime_ns, was.st_mtime_ns))
    done[:] = [0] * 4
    assert features("--batch-size", "2") == 0
    assert done[4:] == [1, 2]
    first = open_split("data", "test").features[:]
    for file in (folder / "data").iterdir():
        file.unlink()
    assert features() == 0
    assert open_split("data", "test").features[:] == pytest.approx(first, abs=1e-6)


class Boxes:
    """A detector that proposes two boxes in a picture, and none in the green one."""

    count, feature_size, sides = 3, 2, [30]

    def regions(self, picture):
        n = 0 if picture.getpixel((0, 0))[1] > 100 > picture.getpixel((0, 0))[0] else 2
        return np.ones((n, 2), np.float32), np.tile(np.array([0, 0, 0.5, 0.5], np.float32), (n, 1))

    def whole(self, picture):
        return np.full((1, 2), 7, np.float32), np.array([[0, 0, 1, 1]], np.float32)


def test_a_picture_without_boxes_becomes_one_region(folder, capsys, monkeypatch):
    monkeypatch.setattr(detectors, "is_detector", lambda name: True)
    monkeypatch.setattr(detectors, "load", lambda *_: Boxes())
    monkeypatch.setattr(detectors, "Detector", Boxes)
    words = ["features", "pictures/test", "data", "--captions", "captions.csv", "--backbone", "torchvision:boxes"]
    assert main([*words, "--no-progress"]) == 0
    kept = "the detector proposes no box in 2 pictures, kept as one whole-picture region: more/test 1.png, test5.jpg"
    assert kept in capsys.readouterr().err
    split = open_split("data", "test")
    assert split.region_lengths.tolist() == [1, 2, 2, 2, 2, 1]
    assert split.boxes[:][0].tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4]
    assert split.features[:][0].tolist() == [[7, 7], [0, 0], [0, 0]]


def test_features_that_are_not_finite_say_what_a_change_costs(folder, capsys, monkeypatch):
    whole = backbones.Backbone.map
    monkeypatch.setattr(backbones.Backbone, "map", lambda self, pixels: whole(self, pixels) * 1e9)
    assert features("--half") == 2
    err = capsys.readouterr().err
    assert "test 1.png have a value that is not finite in float16; leave out --half, and delete data/.test.unfin" in err
    (folder / "data/.test.unfinished").rename("elsewhere")
    assert features() == 0


def test_all_kinds_of_pictures_become_rgb(tmp_path):
    red, size = (255, 0, 0), (8, 6)
    turned = Image.new("RGB", size, red)
    turned.paste((0, 0, 255), (0, 0, 4, 6))  # its left half is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = Image.new("RGBA", size, (*red, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("CMYK", size, (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("RGB", size, red).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", size, (0, 0, 255))]
    )
    Image.fromarray(np.full((6, 8), 128 << 8, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((6, 8), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:-40])
    (tmp_path / "text.jpg").write_text("no picture")

    upright = pictures.open_rgb(tmp_path / "turned.png")
    assert upright.size == (6, 8)
    assert [upright.getpixel((3, y)) for y in (0, 7)] == [(0, 0, 255), red]
    colours = {name: pictures.open_rgb(tmp_path / name).getpixel((1, 1)) for name in
               ("clear.png", "cmyk.tif", "moving.gif", "deep.png")}  # fmt: skip
    assert colours == {
        "clear.png": (255, 255, 255), "cmyk.tif": red, "moving.gif": red, "deep.png": (128, 128, 128)
    }  # fmt: skip
    wrong, animated = pictures.check(tmp_path, pictures.find(tmp_path), False, 2)
    assert sorted(wrong) == ["cut.png", "float.tif", "text.jpg"]
    assert all(str(tmp_path / name) in sentence for name, sentence in wrong.items())
    assert animated == ["moving.gif"]


def test_bombs_and_broken_pictures_are_named(folder, capsys, monkeypatch):
    (folder / "pictures/test/test2.jpg").write_text("no picture")
    assert features() == 2
    assert "test2.jpg is no whole picture" in capsys.readouterr().err
    assert features("--leave-out-broken") == 0
    out, err = capsys.readouterr()
    assert "1 picture that cannot be read left out: test2.jpg" in err
    assert "5 images" in out
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert features(split="dev") == 2
    assert "decompression bomb" in capsys.readouterr().err


def karpathy(name, part, cocoid, *texts):
    """An image of Karpathy's splits of COCO."""
    sentences = [{"raw": f" {text}.\n", "sentid": cocoid + 1000 + n} for n, text in enumerate(texts)]
    entry = {"filepath": "val2014", "filename": name, "split": part, "sentences": sentences, "cocoid": cocoid}
    return entry | {"imgid": 0, "sentids": [each["sentid"] for each in sentences]}


def test_a_part_of_karpathys_splits_keeps_cocos_ids(folder, capsys):
    images = [karpathy(f"test{n}.jpg", "test", 50 + n, f"picture {n}", "a square") for n in (2, 0)]
    images += [karpathy("train0.jpg", "train", 7, "first"), karpathy("train2.jpg", "restval", 8, "second")]
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    assert features(captions="dataset_coco.json", split="testall", images="pictures/test") == 0
    split = open_split("data", "testall")
    assert split.captions == ["picture 2.", "a square.", "picture 0.", "a square."]  # in the order of that file
    assert split.image_ids.tolist() == [52, 50]
    assert split.caption_ids.tolist() == [1052, 1053, 1050, 1051]
    assert (folder / "data/testall_pictures.txt").read_text() == "test2.jpg\ntest0.jpg\n"
    blue = np.tile(np.array(COLOURS["blue"], np.uint8), (1, 32, 32, 1))
    wanted = backbones.load("timm:tiny", "random").map(blue)[0, :, 0, 0].numpy()
    assert split.features[:][0, 0] == pytest.approx(wanted, abs=0.1)  # JPEG's blue is a few steps of 255 off
    assert split.features[:][1, 0] != pytest.approx(wanted, abs=0.1)
    assert features(captions="dataset_coco.json", split="train") == 0
    assert open_split("data", "train").image_ids.tolist() == [7, 8]
    capsys.readouterr()
    assert features(captions="dataset_coco.json", split="dev") == 2
    assert "has no images of a split 'dev'; it has restval, test, train" in capsys.readouterr().err


def arrays(folder, third):
    rng = np.random.default_rng(0)
    (folder / "arrays").mkdir()
    kept = [rng.standard_normal((R, 6)).astype(np.float32) for R in (3, 2)]
    bbox = np.array([[0, 0, 50, 20], [10, 10, 100, 40]], np.float32)
    np.savez(folder / "arrays/test0.jpg.npz", x=kept[0], boxes=np.full((3, 4), 0.5, np.float32))
    np.savez(folder / "arrays/test2.npz", features=kept[1], bbox=bbox, image_w=100, image_h=40)
    if third is not None:
        np.save(folder / "arrays/test3.npy", third, allow_pickle=True)
    return kept


def test_one_array_per_image(folder, capsys):
    kept = arrays(folder, None)
    assert features(images="arrays", source=("--from-arrays",)) == 0
    assert capsys.readouterr().out == "data: test, 2 images of 3 regions x 6 features, 4 captions\n"
    split = open_split("data", "test")
    assert split.region_lengths.tolist() == [3, 2]
    assert np.array_equal(split.features[:][0], kept[0])
    assert np.array_equal(split.features[:][1, :2], kept[1])
    assert split.boxes[:][1, :2] == pytest.approx(np.array([[0, 0, 0.5, 0.5], [0.1, 0.25, 1, 1]]))
    assert (folder / "data/test_pictures.txt").read_text() == "test0.jpg\ntest2\n"


@pytest.mark.parametrize(
    "third, sentence",
    [
        (np.zeros((2, 5), np.float32), "test3.npy has 5 features for each region, and test0.jpg.npz has 6"),
        (np.zeros((2, 6), np.float32), "test0.jpg.npz has boxes, and test3.npy has none"),
        (np.zeros((2, 6), np.int64), "must be [regions, features] of floating-point numbers, got int64 [2, 6]"),
        (np.array([{}]), "test3.npy is not a whole .npy file of numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_named(folder, capsys, third, sentence):
    arrays(folder, third)
    assert features(images="arrays", source=("--from-arrays",)) == 2
    assert sentence in capsys.readouterr().err


def test_weights_of_your_own(folder, capsys, timm):
    own = Tiny()
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()} | {"fc.weight": torch.ones(2)}},
               "own.pt")  # fmt: skip
    loaded = backbones.load("timm:tiny", "own.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    mean, std = (torch.tensor(each)[:, None, None] for each in NORMALISED)
    image = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    assert loaded.map(pixels).numpy() == pytest.approx(own.conv(image).detach().numpy(), abs=1e-5)
    assert not timm.made[-1]["pretrained"]
    backbones.load("timm:tiny")
    assert timm.made[-1]["pretrained"]
    torch.save({"conv.weight": torch.ones(2)}, "other.pt")
    torch.save(own, "whole.pt")
    unfit = "2 of its tensors are missing, .* such as conv.bias; name .* such as conv.weight"
    for file, sentence in (("other.pt", unfit), ("whole.pt", "wants a state_dict")):
        with pytest.raises(ValueError, match=sentence):
            backbones.load("timm:tiny", file)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--backbone", "resnet50"], "a backbone is timm:NAME or torchvision:NAME"),
        (["--backbone", "timm:nothing"], "timm has no model 'nothing'"),
        (["--backbone", "torchvision:resnet18"], "needs the package torchvision: pip install '.[features]'"),
        (["--grid", "9"], "8 x 8 entries, too few for --grid 9"),
        (["--grid", "0"], "--grid must be at least 1, got 0"),
        (["--split", "a/b"], "--split must be a name such as train"),
        (["--captions", "none.csv"], "none.csv"),
        (["--captions", "other.json"], "no caption fits a file: other.json names 'x.jpg'"),
    ],
)
def test_mistakes_are_a_sentence(folder, capsys, monkeypatch, words, sentence):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (folder / "other.json").write_text('{"x.jpg": "a kite"}')
    assert features(*words) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err


def test_weights_that_cannot_be_downloaded_are_named(timm, monkeypatch):
    def offline(name, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"weights of timm:tiny were not downloaded .Name.*give their file by --weights"):
        backbones.load("timm:tiny")
    with pytest.raises(OSError, match=r"^Name or service not known$"):
        backbones.load("timm:tiny", "random")


def test_a_torchvision_for_another_torch_is_named(folder, capsys, monkeypatch):
    (folder / "modules/torchvision").mkdir(parents=True)
    (folder / "modules/torchvision/__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder / "modules")
    assert features("--backbone", "torchvision:resnet18") == 2
    err = capsys.readouterr().err
    assert "needs torchvision, which is installed and cannot be imported (operator nms does not exist)" in err
    assert f"built for this torch, {torch.__version__}" in err


@pytest.mark.skipif(not GUIDE.is_file(), reason="needs a checkout")
def test_the_guides_commands_run_one_after_another(folder, capsys, monkeypatch):
    text = GUIDE.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    # A small network and few steps; all else is as the guide has it.
    small = ["--max-steps", "2", "--batch-size", "4", "--embed-size", "16", "--word-dim", "8", "--min-count", "1"]
    extra = {"features": ["--weights", "random"], "train": [*small, "--quiet"]}
    ran = []
    for line in filter(None, "\n".join(blocks).splitlines()):
        program, command, *words = shlex.split(line)
        assert program == "itm-fast"
        assert main([command, *words, *extra.get(command, [])]) == 0, f"{line}\n{capsys.readouterr().err}"
        ran.append(command)
    assert set(ran) == {"features", "train", "evaluate", "attend", "compare", "gallery", "search"}
    for name in ("data/mine/train_ims.npy", "figure.svg", "tables/difference.json", "found.html"):
        assert (folder / name).stat().st_size
    for name in re.findall(r"`tables/saf/(\w+\.\w+)`", text):
        assert (folder / "tables/saf" / name).stat().st_size, name
    assert "<image" in (folder / "figure.svg").read_text()
    assert "data:image/jpeg" in (folder / "found.html").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    logged = []
    run = contextlib.nullcontext(types.SimpleNamespace(log=lambda data, step: logged.append((step, data))))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: run))
    sizes = dict(batch_size=4, embed_size=16, word_dim=8, sim_dim=8)
    monkeypatch.setattr(training, "options", functools.partial(training.options, **sizes), raising=False)
    monkeypatch.setattr(training, "train", functools.partial(training.train, max_steps=2), raising=False)
    monkeypatch.setattr(Vocabulary, "build", functools.partial(Vocabulary.build, min_count=1))
    exec(compile(example, "GUIDE.md", "exec"), {})
    assert [(step, "dev/rsum" in data) for step, data in logged] == [(1, False), (2, False), (2, True)]
