"""A page of search results: HTML with the pictures inside, which needs no other file."""

from __future__ import annotations

import base64
import html
import io
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..gallery import Found

_SIDE = 320  # pixels of the longer side
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #212529; background: #fff; max-width: 1180px;
  margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: .3em; }
h2 { font-size: 1.15em; margin: 2em 0 .6em; border-top: 1px solid #e1e4e8; padding-top: 1em; overflow-wrap: anywhere; }
.how { color: #5c636a; } .approximate { background: #fff3cd; color: #664d03; padding: .6em .9em; border-radius: 6px; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
figure { margin: 0; }
.picture { height: 170px; display: flex; align-items: center; justify-content: center; background: #f6f7f8;
  border-radius: 6px; overflow: hidden; color: #868e96; font-size: .85em; }
img { max-width: 100%; max-height: 100%; }
figcaption { font-size: .85em; margin-top: .35em; overflow-wrap: anywhere; }
.score { color: #5c636a; font-variant-numeric: tabular-nums; }
"""


class Pictures:
    """The pictures of a folder, found by an image's name.

    A picture is `folder/name`, with or without one of the usual endings. A name that is a number, such as an image id
    of COCO, is also found as the last 12 digits of a file's name.

    Args:
        folder: of the pictures; or the package's own data, for its thumbnails.
    """

    def __init__(self, folder: Path) -> None:
        from ..data import openclipart

        self.folder = folder.resolve()
        packaged = self.folder == openclipart.FOLDER
        self._rows = {name: row for row, name in enumerate(openclipart.picture_names())} if packaged else None

    def find(self, name: str) -> Image | None:
        """A picture, at most 320 pixels a side; None if there is none of this name, or it cannot be read."""
        from PIL import Image

        from ..data.openclipart import thumbnails

        if self._rows is not None:
            return thumbnails([self._rows[name]])[0] if name in self._rows else None
        path = self._path(name)
        if path is None:
            return None
        try:
            with Image.open(path) as picture:
                picture.thumbnail((_SIDE, _SIDE))
                return _on_white(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    def _path(self, name: str) -> Path | None:
        for suffix in _SUFFIXES:
            path = (self.folder / f"{name}{suffix}").resolve()
            # A name comes with the gallery, maybe from a stranger: "../x" is not to show another picture of the disk.
            if path.is_relative_to(self.folder) and path.is_file():
                return path
        return self._numbered.get(int(name)) if name.isdecimal() else None

    @cached_property
    def _numbered(self) -> dict[int, Path]:
        files = ((re.search(r"\d{12}$", path.stem), path) for path in sorted(self.folder.iterdir()))
        return {int(number[0]): path for number, path in files if number}


def page(found: Found, pictures: Pictures | None) -> str:
    """The page as text.

    Args:
        found: what to show.
        pictures: where the pictures are found; None: only names and scores are shown.
    """
    kind = "approximate" if found.approximate else "how"
    title = html.escape(found.captions[0] if len(found.captions) == 1 else f"{len(found.captions):,} captions")
    inside: dict[str, str] = {}  # each picture is encoded once
    parts = []
    for caption, unknown, names, scores in zip(
        found.captions, found.unknown, found.names, found.scores.tolist(), strict=True
    ):
        parts.append(f"<h2>{html.escape(caption)}</h2>")
        if unknown:
            parts.append(f'<p class="how">unknown to the model: {html.escape(", ".join(unknown))}</p>')
        parts.append("<ol>")
        for rank, (name, score) in enumerate(zip(names, scores, strict=True), 1):
            if name not in inside:
                inside[name] = _picture(name, pictures)
            parts.append(
                f'<li><figure><div class="picture">{inside[name]}</div><figcaption>{rank}. '
                f'<span class="score">{score:.4f}</span><br>{html.escape(name)}</figcaption></figure></li>'
            )
        parts.append("</ol>")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(found.model)}: best images</h1>\n<p class="{kind}">{html.escape(found.how)}</p>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _picture(name: str, pictures: Pictures | None) -> str:
    found = None if pictures is None else pictures.find(name)
    if found is None:
        return "no picture"
    data = io.BytesIO()
    found.save(data, "JPEG", quality=85)
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _on_white(picture: Image) -> Image:
    """Without transparency, as JPEG has none."""
    from PIL import Image

    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")
