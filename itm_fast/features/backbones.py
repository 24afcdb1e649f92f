"""Networks of timm and torchvision without their classifiers: pictures in, the last feature map out."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models._common import usable_device
from ..models.torch_file import load_plain

if TYPE_CHECKING:
    from PIL import Image

_HEADS = ("fc.", "classifier.", "head.", "heads.", "last_linear.")  # the classifier, which no feature map needs
_FORMS = "a backbone is timm:NAME or torchvision:NAME, such as timm:resnet50.a1_in1k or torchvision:resnet50"


@dataclass
class Backbone:
    """A network, and how its pictures are prepared.

    Attributes:
        features: [B, 3, height, width] float32 -> the last feature map, [B, F, H, W].
        size: (height, width) in pixels, to which the whole picture is resized, without cropping.
        mean, std: of red, green and blue between 0 and 1, by which pixels are normalised.
        device: where the network lies.
    """

    features: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    def pixels(self, picture: Image.Image) -> NDArray[np.uint8]:
        """A picture, RGB, in the network's size: [height, width, 3]."""
        from PIL import Image

        return np.asarray(picture.resize(self.size[::-1], Image.Resampling.BICUBIC), np.uint8)

    def map(self, pixels: NDArray[np.uint8]) -> Tensor:
        """The feature map [B, F, H, W] float32 of pixels [B, height, width, 3]."""
        image = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (image.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        with torch.no_grad():
            return self.features((image - mean) / std).float()


def load(name: str, weights: str | None = None, size: int | None = None, device: str | None = None) -> Backbone:
    """A backbone by name.

    Args:
        name: `timm:NAME` or `torchvision:NAME`.
        weights: a file of `torch.save` with the network's state_dict; `random` for tests; None: those that the package
            downloads for this name.
        size: pixels of each side of the resized picture; None: the network's own.
        device: such as `cuda`; None: a GPU if there is one.

    Raises:
        ValueError: there is no such network, it has no feature map, or the weights do not fit it.
        ImportError: timm or torchvision is not installed, or cannot be imported.
        OSError: the file of weights cannot be opened, or the package's own cannot be downloaded.
    """
    family, _, model = name.partition(":")
    if family not in _FAMILIES or not model:
        raise ValueError(f"{_FORMS}, got {name!r}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    state = None if weights in (None, "random") else state_dict(Path(weights))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # random weights are the same when an interrupted command goes on
        made_by = package(family, name)
        with downloads(name, weights is None):
            network, features, own, mean, std = _FAMILIES[family](made_by, model, weights is None, size)
    if state is not None:
        fit(network, state, Path(weights))  # type: ignore[arg-type]
    network.requires_grad_(False).eval().to(where := usable_device(device))
    return Backbone(features, (size, size) if size else own, tuple(mean), tuple(std), where)


@contextlib.contextmanager
def downloads(name: str, pretrained: bool) -> Iterator[None]:
    """Say what to do where a package cannot download the weights of this name."""
    try:
        yield
    except OSError as error:
        if not pretrained:
            raise
        raise OSError(
            f"the weights of {name} were not downloaded ({error}); where there is no network, give their file by "
            "--weights FILE"
        ) from error


def package(family: str, name: str) -> Any:
    """The module timm or torchvision, for a backbone of this name.

    Raises:
        ImportError: it is not installed, or it cannot be imported, as when it was built for another torch.
    """
    try:
        return importlib.import_module(family)
    except ModuleNotFoundError as error:
        if error.name not in ("timm", "torchvision"):
            raise
        raise ModuleNotFoundError(
            f"--backbone {name} needs the package {error.name}: pip install '.[features]' in the source folder of "
            "itm-fast",
            name="itm_fast",
        ) from None
    except Exception as error:  # torchvision raises what its compiled operators raise
        raise ImportError(
            f"--backbone {name} needs {family}, which is installed and cannot be imported ({error}); torchvision must "
            f"be built for this torch, {torch.__version__}: install both by one command from one package index"
        ) from error


def regions(maps: Tensor, grid: int) -> Tensor:
    """Pool feature maps [B, F, H, W] to [B, grid * grid, F], row by row: the mean of each cell of `cells`.

    >>> regions(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    return nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def cells(height: int, width: int, grid: int) -> NDArray[np.float32]:
    """The cells of a feature map [height, width] that are pooled, as parts of the picture.

    Where `grid` does not divide the map's sides, cells overlap: a cell from i / grid to (i + 1) / grid takes in all
    entries that it touches, as `torch.nn.functional.adaptive_avg_pool2d` does.

    Returns:
        [grid * grid, 4] left, top, right and bottom, row by row.

    Raises:
        ValueError: the map has fewer rows or columns than the grid, so that regions would repeat.

    >>> cells(4, 4, 2).tolist()[1]
    [0.5, 0.0, 1.0, 0.5]
    >>> (7 * cells(7, 7, 6)[0]).round().tolist()  # two rows and columns of seven
    [0.0, 0.0, 2.0, 2.0]
    """
    if min(height, width) < grid:
        raise ValueError(
            f"the backbone's last feature map has {height} x {width} entries, too few for --grid {grid}; take a "
            "smaller grid, or larger pictures by --size"
        )

    def edges(side: int) -> list[tuple[float, float]]:
        return [(i * side // grid / side, -(-(i + 1) * side // grid) / side) for i in range(grid)]

    return np.array([[l, t, r, b] for t, b in edges(height) for l, r in edges(width)], np.float32)


_Parts = tuple[nn.Module, Callable[[Tensor], Tensor], tuple[int, int], Any, Any]


def _timm(timm: Any, name: str, pretrained: bool, size: int | None) -> _Parts:
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them")
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if size is not None and hasattr(model, "set_input_size"):  # transformers have position embeddings for one size
        model.set_input_size(img_size=(size, size))
    config = timm.data.resolve_model_data_config(model)

    def features(image: Tensor) -> Tensor:
        out = model.forward_features(image)
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if out.ndim == 3 and grid:  # a vision transformer: class tokens, then patches row by row
            patches = out[:, getattr(model, "num_prefix_tokens", 0) :]
            return patches.transpose(1, 2).unflatten(2, tuple(grid))
        if out.ndim != 4:
            raise ValueError(f"timm:{name} has no feature map: its features are {list(out.shape)}; take another one")
        return out if out.shape[1] == model.num_features else out.permute(0, 3, 1, 2)  # Swin has channels last

    return model, features, tuple(config["input_size"][1:]), config["mean"], config["std"]


def _torchvision(torchvision: Any, name: str, pretrained: bool, size: int | None) -> _Parts:
    models = torchvision.models
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no network {name!r}; torchvision.models.list_models() lists them")
    model = models.get_model(name, weights="DEFAULT" if pretrained else None)
    prepared = models.get_model_weights(name).DEFAULT.transforms()

    # Before the classifier the last feature map is pooled, by a module of this name in most networks.
    if isinstance(getattr(model, "avgpool", None), nn.Module):
        kept: list[Tensor] = []
        model.avgpool.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))

        def features(image: Tensor) -> Tensor:
            kept.clear()
            model(image)
            return kept.pop()
    elif isinstance(getattr(model, "features", None), nn.Module):
        features = model.features
    else:
        raise ValueError(f"torchvision:{name} has no feature map that we know; take a ResNet, or timm:NAME")
    side = prepared.crop_size[0]
    return model, features, (side, side), prepared.mean, prepared.std


_FAMILIES = {"timm": _timm, "torchvision": _torchvision}


def state_dict(path: Path) -> dict[str, Tensor]:
    """The state_dict of a file, which may also hold it under `state_dict` or `model`; without classifiers.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be opened.
    """
    content, _ = load_plain(path, wanted="--weights wants a state_dict that torch.save wrote")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state_dict (names and tensors)")
    given = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in given.items() if not name.startswith(_HEADS)}


def fit(network: nn.Module, given: Mapping[str, Tensor], path: Path) -> None:
    """Load a state_dict into a network; what the classifier has keeps its values.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names `path`.
    """
    own = network.state_dict()
    wanted = {name: value for name, value in own.items() if not name.startswith(_HEADS)}
    wrong = sorted(
        name
        for name in {*given, *wanted}
        if name not in given or name not in wanted or given[name].shape != wanted[name].shape
    )
    if wrong:
        raise ValueError(
            f"{path} does not fit the backbone: {len(wrong)} of its tensors are missing, unknown or of another shape, "
            f"such as {wrong[0]}; name the backbone that these weights are of, or rename them as this one's, such as "
            f"{next(iter(wanted), 'none')}"
        )
    network.load_state_dict(given, strict=False)
