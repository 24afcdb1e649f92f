"""A drawing of texts, boxes, lines and pictures, written as PNG or as SVG."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)


class _Mark(NamedTuple):
    """One thing drawn: "text", "box", "line" or "image", where, and how."""

    kind: str
    at: tuple[float, ...]
    how: dict[str, Any]


class Canvas:
    """Collects what is drawn, in pixels from the top left corner.

    Args:
        width: of the drawing; its height is that of the lowest thing drawn, and a margin.
        margin: below the lowest thing.
    """

    def __init__(self, width: int, margin: int) -> None:
        self.width, self.margin = width, margin
        self._marks: list[_Mark] = []
        self._lowest = 0.0

    def _add(self, kind: str, at: tuple[float, ...], bottom: float, **how: Any) -> None:
        self._marks.append(_Mark(kind, at, how))
        self._lowest = max(self._lowest, bottom)

    def text(self, x: float, y: float, text: str, colour: Colour, size: int) -> None:
        """A line of text whose top left corner is (x, y)."""
        self._add("text", (x, y), y + size, text=text, colour=colour, size=size)

    def box(
        self, x: float, y: float, right: float, bottom: float, outline: Colour,
        fill: Colour | None = None, width: int = 1, radius: int = 0,
    ) -> None:  # fmt: skip
        """A rectangle, with round corners if `radius` is given."""
        self._add("box", (x, y, right, bottom), bottom, outline=outline, fill=fill, width=width, radius=radius)

    def line(self, x: float, right: float, y: float, colour: Colour) -> None:
        """A horizontal line."""
        self._add("line", (x, y, right, y), y, colour=colour)

    def image(self, x: float, y: float, picture: Image.Image) -> None:
        """A picture whose top left corner is (x, y)."""
        self._add("image", (x, y), y + picture.height, picture=picture)

    @property
    def height(self) -> int:
        return round(self._lowest) + self.margin

    def to_image(self) -> Image.Image:
        """The drawing in pixels."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(image)
        for kind, at, how in self._marks:
            if kind == "text":
                pen.text((at[0], at[1]), how["text"], how["colour"], font(how["size"]))
            elif kind == "box":
                pen.rounded_rectangle(at, how["radius"], how["fill"], how["outline"], how["width"])
            elif kind == "line":
                pen.line(at, how["colour"])
            else:
                image.paste(how["picture"], (round(at[0]), round(at[1])))
        return image

    def to_svg(self) -> str:
        """The drawing as SVG, which needs no other file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="Helvetica, Arial, sans-serif">',
            f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
        ]
        for kind, at, how in self._marks:
            x, y = at[:2]
            if kind == "text":
                # The length keeps the place that the text has in the PNG, whatever font the viewer has.
                length = font(how["size"]).getlength(how["text"])
                parts.append(
                    f'<text x="{x:g}" y="{y + 0.86 * how["size"]:g}" font-size="{0.94 * how["size"]:g}" '
                    f'fill="{_hex(how["colour"])}" textLength="{length:g}" lengthAdjust="spacingAndGlyphs" '
                    f'xml:space="preserve">{escape(how["text"])}</text>'
                )
            elif kind == "box":
                fill = "none" if how["fill"] is None else _hex(how["fill"])
                parts.append(
                    f'<rect x="{x:g}" y="{y:g}" width="{at[2] - x:g}" height="{at[3] - y:g}" rx="{how["radius"]}" '
                    f'fill="{fill}" stroke="{_hex(how["outline"])}" stroke-width="{how["width"]}"/>'
                )
            elif kind == "line":
                parts.append(f'<path d="M{x:g} {y:g}H{at[2]:g}" stroke="{_hex(how["colour"])}"/>')
            else:
                file = io.BytesIO()
                how["picture"].save(file, "PNG")
                width, height = how["picture"].size
                parts.append(
                    f'<image x="{x:g}" y="{y:g}" width="{width}" height="{height}" '
                    f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'
                )
        return "\n".join([*parts, "</svg>\n"])


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def fitting(text: str, width: int, size: int) -> str:
    """The text, cut and ended by dots if it is wider than `width`."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
