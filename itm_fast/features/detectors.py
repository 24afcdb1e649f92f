"""Region features of a torchvision detector's boxes: those of Faster, Mask and Keypoint R-CNN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models._common import usable_device
from .backbones import downloads, fit, package, state_dict

if TYPE_CHECKING:
    from PIL import Image

OVERLAP = 0.3  # of two proposals of one class that overlap more, the one with the higher score is kept
_CLASSES = "roi_heads.box_predictor.cls_score.bias"


@dataclass
class Detector:
    """A two-stage detector, whose box head gives a vector for each proposed box.

    Attributes:
        network: torchvision's `GeneralizedRCNN`.
        count: R, the most regions of a picture.
        device: where the network lies.
    """

    network: Any
    count: int
    device: torch.device

    @property
    def feature_size(self) -> int:
        """F, the features of a region."""
        return self.network.roi_heads.box_predictor.cls_score.in_features

    @property
    def sides(self) -> list[int]:
        """Pixels to which the network resizes a picture: its shorter side, and the longer one at most."""
        transform = self.network.transform
        return [*transform.min_size, transform.max_size]

    @torch.no_grad()
    def regions(self, picture: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The regions of one picture, RGB, the surest first.

        They are the proposals with the highest scores of any class but background, after non-maximum suppression within
        each class, as in bottom-up attention (Anderson et al., CVPR 2018). The features are those of the recorded box,
        before its class-specific shift. Pictures go through the network one by one: in a batch they would be padded to
        a common size, and the features would depend on the other pictures.

        Returns:
            [n, F], and [n, 4] left, top, right and bottom as parts of the picture; n is `count` or less.
        """
        from torchvision.ops import batched_nms

        images, maps = self._maps(picture)
        proposals, _ = self.network.rpn(images, maps)
        features = self._features(images, maps, proposals[0])
        scores, classes = self.network.roi_heads.box_predictor(features)[0].softmax(1)[:, 1:].max(1)
        kept = batched_nms(proposals[0], scores, classes, OVERLAP)[: self.count]
        height, width = images.image_sizes[0]
        boxes = (proposals[0][kept] / scores.new_tensor([width, height, width, height])).clamp(0, 1)
        wide = (boxes[:, 2:] > boxes[:, :2]).all(1)  # boxes without area stand for regions that are not there
        return features[kept][wide].cpu().numpy(), boxes[wide].cpu().numpy()

    @torch.no_grad()
    def whole(self, picture: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The whole picture as one region, for a picture in which the network proposes no box.

        Returns:
            [1, F], and [1, 4] as `regions`.
        """
        images, maps = self._maps(picture)
        height, width = images.image_sizes[0]
        box = images.tensors.new_tensor([[0, 0, width, height]])
        return self._features(images, maps, box).cpu().numpy(), np.array([[0, 0, 1, 1]], np.float32)

    def _maps(self, picture: Image.Image) -> tuple[Any, dict[str, torch.Tensor]]:
        """The resized picture, torchvision's `ImageList` of one, and its feature maps."""
        pixels = torch.from_numpy(np.array(picture, np.uint8)).to(self.device).permute(2, 0, 1).float() / 255
        images, _ = self.network.transform([pixels])
        maps = self.network.backbone(images.tensors)
        return images, {"0": maps} if isinstance(maps, torch.Tensor) else maps

    def _features(self, images: Any, maps: dict[str, torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """The box head's vectors [n, F] of boxes [n, 4] in pixels of the resized picture."""
        heads = self.network.roi_heads
        return heads.box_head(heads.box_roi_pool(maps, [boxes], images.image_sizes))


def is_detector(name: str) -> bool:
    """Whether `name` is that of a detector of torchvision, which has its own list of them.

    Raises:
        ImportError: torchvision is asked for and cannot be imported.
    """
    family, _, model = name.partition(":")
    if family != "torchvision":
        return False
    models = package("torchvision", name).models
    return model in models.list_models(module=models.detection)


def load(name: str, weights: str | None, size: int | None, device: str | None, count: int) -> Detector:
    """A detector by name.

    Args:
        name: `torchvision:NAME`, one for which `is_detector` is true.
        weights: as for `backbones.load`; a file may have any number of classes.
        size: pixels of the shorter side of the resized picture; None: the network's own.
        device: such as `cuda`; None: a GPU if there is one.
        count: R, the most regions of a picture.

    Raises:
        ValueError: the detector has no features of boxes, or the weights do not fit it.
        ImportError: torchvision cannot be imported.
        OSError: the file of weights cannot be opened, or the package's own cannot be downloaded.
    """
    models = package("torchvision", name).models
    model = name.partition(":")[2]
    state = None if weights in (None, "random") else state_dict(Path(weights))  # type: ignore[arg-type]
    options: dict[str, Any] = {"weights": "DEFAULT"} if weights is None else {"weights": None, "weights_backbone": None}
    if state is not None and _CLASSES in state:
        options["num_classes"] = len(state[_CLASSES])
    if "rcnn" not in model:  # SSD, RetinaNet and FCOS classify cells of feature maps, and have no vector for a box
        known = [each for each in models.list_models(module=models.detection) if "rcnn" in each]
        raise ValueError(f"{name} computes no features of boxes; take one of {', '.join(known)}")
    with torch.random.fork_rng(devices=()), downloads(name, weights is None):
        torch.manual_seed(0)  # random weights are the same when an interrupted command goes on
        network = models.get_model(model, **options)
    if state is not None:
        fit(network, state, Path(weights))  # type: ignore[arg-type]
    network.rpn.score_thresh = 0.0  # a picture without a sure box has regions as well
    if size is not None:
        transform = network.transform
        transform.max_size = round(size * transform.max_size / min(transform.min_size))
        transform.min_size = (size,)
    network.requires_grad_(False).eval().to(where := usable_device(device))
    return Detector(network, count, where)
