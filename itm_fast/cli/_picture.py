"""Draw what a model attends to: words shaded by weight, regions as a heat map over the picture; one row per query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._canvas import PAPER, Canvas, fitting, font

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

WIDTH, MARGIN, TILE, GAP, MAPS = 1180, 28, 150, 14, 5
INK, FAINT, RULE = (33, 37, 41), (120, 126, 133), (225, 228, 232)
RIGHT, WRONG = (38, 128, 82), (190, 196, 202)
WORD_COLOUR, HEAT = np.array([247, 148, 60]), np.array([214, 40, 40])
_CELLS = 50  # a heat map of boxes has 50 x 50 cells


@dataclass(frozen=True, eq=False)
class Query:
    """One row of the picture.

    Attributes:
        text: the caption, as given.
        note: a line about the result, such as the rank of the right picture.
        results: thumbnails of the best pictures, best first.
        right: which of `results` is the right one; None when it is not among them or not known.
        words: labels of what has a weight: the words of the caption, before them perhaps the whole picture.
        weights: of each of `words`.
        regions: [W, R] attention over the regions of the first result, for each of the last W of `words`.
        boxes: [R, 4] left, top, right and bottom of the regions, as parts of the picture; None: they are a grid.
        first: what stands below the first result.
        shares: whether the weights are parts of a whole, shown in percent.
    """

    text: str
    note: str
    results: list[Image.Image]
    right: int | None
    words: list[str]
    weights: NDArray[np.floating]
    regions: NDArray[np.floating]
    boxes: NDArray[np.floating] | None = None
    first: str = "first result"
    shares: bool = True

    def weight(self, number: int) -> str:
        """A weight as text."""
        return f"{self.weights[number]:.0%}" if self.shares else f"{self.weights[number]:.2f}"


def draw(title: str, subtitle: str, queries: list[Query]) -> Canvas:
    """The whole picture, `WIDTH` pixels wide."""
    canvas = Canvas(WIDTH, MARGIN)
    canvas.text(MARGIN, MARGIN, title, INK, 26)
    canvas.text(MARGIN, MARGIN + 38, subtitle, FAINT, 15)
    top = MARGIN + 74
    for query in queries:
        canvas.line(MARGIN, WIDTH - MARGIN, top, RULE)
        top = _row(canvas, query, top) + 44
    return canvas


def _row(canvas: Canvas, query: Query, y: int) -> int:
    """Draw a row from `y` on; return the y of the bottom of its pictures."""
    y = _words(canvas, query, y + 18) + 12
    canvas.text(MARGIN, y, query.note, FAINT, 15)
    y += 30
    picture = _fit(query.results[0])
    canvas.image(MARGIN, y, picture)
    edge = {True: RIGHT, False: WRONG}[query.right == 0]
    canvas.box(MARGIN, y, MARGIN + TILE - 1, y + TILE - 1, edge, width=2)
    canvas.text(MARGIN, y + TILE + 6, query.first, INK, 14)
    before = len(query.words) - len(query.regions)
    shown = sorted(sorted(_shown(query.words[before:]), key=lambda word: -query.weights[before + word])[:MAPS])
    for column, word in enumerate(shown, 1):
        x = MARGIN + column * (TILE + GAP)
        canvas.image(x, y, heat(picture, spread(query.regions[word], query.boxes)))
        canvas.box(x, y, x + TILE - 1, y + TILE - 1, WRONG)
        label = f"{query.words[before + word]}  {query.weight(before + word)}"
        canvas.text(x, y + TILE + 6, fitting(label, TILE, 14), INK, 14)

    if query.results[1:]:
        small = 46
        left = WIDTH - MARGIN - 2 * small - 8
        canvas.text(left - 2, y + TILE + 6, "others", INK, 14)
        for place, result in enumerate(query.results[1:7], 1):
            x, above = left + (place - 1) % 2 * (small + 8), y + (place - 1) // 2 * (small + 6)
            canvas.image(x, above, _fit(result, small))
            colour = RIGHT if query.right == place else WRONG
            canvas.box(x - 1, above - 1, x + small, above + small, colour, width=2 if query.right == place else 1)
    return y + TILE


def _fit(picture: Image.Image, side: int = TILE) -> Image.Image:
    from PIL import Image

    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _words(canvas: Canvas, query: Query, y: int) -> int:
    """Draw the words as boxes shaded by weight, in lines from `y` on; return the y below the last line."""
    x = MARGIN
    strongest = max(float(query.weights.max()), 1e-12)
    for number, word in enumerate(query.words):
        share = max(0.0, float(query.weights[number])) / strongest
        width = int(font(19).getlength(word)) + 18
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 58
        red, green, blue = (int(value) for value in 255 - share * (255 - WORD_COLOUR))
        canvas.box(x, y, x + width, y + 32, RULE, (red, green, blue), radius=7)
        canvas.text(x + 9, y + 4, word, INK, 19)
        below = query.weight(number)
        canvas.text(x + (width - font(12).getlength(below)) / 2, y + 35, below, FAINT, 12)
        x += width + 6
    return y + 50


def _shown(words: list[str]) -> list[int]:
    """Numbers of the words that get a heat map: all but `<start>`, `<end>` and punctuation."""
    return [
        number
        for number, word in enumerate(words)
        if any(character.isalnum() for character in word) and not word.startswith("<")
    ]


def spread(weight: NDArray[np.floating], boxes: NDArray[np.floating] | None) -> NDArray[np.floating]:
    """Regions' weights [R] as a map [height, width] of the picture.

    Without boxes, regions fill a square grid row by row; the last cells are empty where R is no square. With boxes a
    place has the sum of the weights of the boxes that it lies in.
    """
    if boxes is None:
        side = int(np.ceil(np.sqrt(len(weight))))
        return np.pad(weight, (0, side * side - len(weight))).reshape(side, side)
    centre = (np.arange(_CELLS) + 0.5) / _CELLS
    left, top, right, bottom = boxes.T[:, :, None]
    across, down = (left <= centre) & (centre <= right), (top <= centre) & (centre <= bottom)  # [R, cells]
    return np.einsum("r,ry,rx->yx", weight, down.astype(weight.dtype), across.astype(weight.dtype))


def heat(picture: Image.Image, weight: NDArray[np.floating]) -> Image.Image:
    """The picture, faded where `weight` [height, width] is low and red where it is high, relative to its largest."""
    from PIL import Image

    weight = weight / max(float(weight.max()), 1e-12)
    share = Image.fromarray(weight.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(share), 0, 1)[:, :, None]
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    grey = pixels.mean(2, keepdims=True)
    faded = 255 - 0.35 * (255 - grey)
    hot = 0.45 * pixels + 0.55 * HEAT
    return Image.fromarray(np.uint8(np.rint((1 - alpha) * faded + alpha * hot)))


def blank() -> Image.Image:
    """What stands in place of a picture that is not there."""
    from PIL import Image

    return Image.new("RGB", (TILE, TILE), PAPER)
