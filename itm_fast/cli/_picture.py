"""Draw what a model attends to: words shaded by weight, regions as a heat map over the picture; one row per query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageFont

WIDTH, MARGIN, TILE, GAP, MAPS = 1180, 28, 150, 14, 5
INK, FAINT, PAPER, RIGHT, WRONG = (33, 37, 41), (120, 126, 133), (255, 255, 255), (38, 128, 82), (190, 196, 202)
WORD_COLOUR, HEAT = np.array([247, 148, 60]), np.array([214, 40, 40])


@dataclass(frozen=True, eq=False)
class Query:
    """One row of the picture.

    Attributes:
        text: the caption, as given.
        note: a line about the result, such as the rank of the right picture.
        results: thumbnails of the best pictures, best first.
        right: which of `results` is the right one; None when it is not among them or not known.
        words: labels of the nodes: the whole picture, then the words of the caption.
        weights: [nodes] weight of each node; their sum is 1.
        regions: [nodes - 1, grid * grid] attention of each word over the regions of the first result.
    """

    text: str
    note: str
    results: list[Image.Image]
    right: int | None
    words: list[str]
    weights: NDArray[np.floating]
    regions: NDArray[np.floating]


def draw(title: str, subtitle: str, queries: list[Query]) -> Image.Image:
    """The whole picture, `WIDTH` pixels wide."""
    from PIL import Image, ImageDraw

    rows = [_row(query) for query in queries]
    top = MARGIN + 74
    canvas = Image.new("RGB", (WIDTH, top + sum(row.height for row in rows) + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), title, INK, _font(26))
    pen.text((MARGIN, MARGIN + 38), subtitle, FAINT, _font(15))
    for row in rows:
        pen.line((MARGIN, top, WIDTH - MARGIN, top), (225, 228, 232))
        canvas.paste(row, (0, top))
        top += row.height
    return canvas


def _row(query: Query) -> Image.Image:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (WIDTH, 400), PAPER)
    pen = ImageDraw.Draw(canvas)
    y = 18
    y = _words(pen, query, y) + 12
    pen.text((MARGIN, y), query.note, FAINT, _font(15))
    y += 30

    grid = round(query.regions.shape[1] ** 0.5)
    picture = query.results[0].resize((TILE, TILE), Image.Resampling.LANCZOS)
    canvas.paste(picture, (MARGIN, y))
    pen.rectangle((MARGIN, y, MARGIN + TILE - 1, y + TILE - 1), outline=RIGHT if query.right == 0 else WRONG, width=2)
    pen.text((MARGIN, y + TILE + 6), "first result", INK, _font(14))
    shown = sorted(sorted(_shown(query), key=lambda word: -query.weights[1 + word])[:MAPS])
    for column, word in enumerate(shown, 1):
        x = MARGIN + column * (TILE + GAP)
        canvas.paste(heat(picture, query.regions[word].reshape(grid, grid)), (x, y))
        pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=WRONG)
        label = f"{query.words[1 + word]}  {query.weights[1 + word]:.0%}"
        pen.text((x, y + TILE + 6), _fitting(label, TILE, 14), INK, _font(14))

    small = 46
    left = WIDTH - MARGIN - 2 * small - 8
    pen.text((left - 2, y + TILE + 6), "others", INK, _font(14))
    for place, result in enumerate(query.results[1:7], 1):
        x, above = left + (place - 1) % 2 * (small + 8), y + (place - 1) // 2 * (small + 6)
        canvas.paste(result.resize((small, small), Image.Resampling.LANCZOS), (x, above))
        colour = RIGHT if query.right == place else WRONG
        box = (x - 1, above - 1, x + small, above + small)
        pen.rectangle(box, outline=colour, width=2 if query.right == place else 1)
    return canvas.crop((0, 0, WIDTH, y + TILE + 44))


def _words(pen, query: Query, y: int) -> int:
    """Draw the nodes as boxes shaded by weight, in lines from `y` on; return the y below the last line."""
    x, font, small = MARGIN, _font(19), _font(12)
    strongest = float(query.weights.max())
    for word, weight in zip(query.words, query.weights, strict=True):
        share = float(weight) / strongest
        width = int(pen.textlength(word, font)) + 18
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 58
        fill = tuple(int(value) for value in 255 - share * (255 - WORD_COLOUR))
        pen.rounded_rectangle((x, y, x + width, y + 32), 7, fill=fill, outline=(225, 228, 232))
        pen.text((x + 9, y + 4), word, INK, font)
        percent = f"{float(weight):.0%}"
        pen.text((x + (width - pen.textlength(percent, small)) / 2, y + 35), percent, FAINT, small)
        x += width + 6
    return y + 50


def _shown(query: Query) -> list[int]:
    """Numbers of the words that get a heat map: all but `<start>`, `<end>` and punctuation."""
    return [
        number
        for number, word in enumerate(query.words[1:])
        if any(character.isalnum() for character in word) and not word.startswith("<")
    ]


def heat(picture: Image.Image, weight: NDArray[np.floating]) -> Image.Image:
    """The picture, faded where `weight` [grid, grid] is low and red where it is high, relative to its largest."""
    from PIL import Image

    share = Image.fromarray((weight / weight.max()).astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(share), 0, 1)[:, :, None]
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    grey = pixels.mean(2, keepdims=True)
    faded = 255 - 0.35 * (255 - grey)
    hot = 0.45 * pixels + 0.55 * HEAT
    return Image.fromarray(np.uint8(np.rint((1 - alpha) * faded + alpha * hot)))


def _fitting(text: str, width: int, size: int) -> str:
    if _font(size).getlength(text) <= width:
        return text
    while _font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
