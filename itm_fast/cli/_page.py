"""A page of search results: HTML with the pictures inside, which needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..gallery import Found

SIDE = 320  # pixels of a picture's longer side
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


def page(found: Found, pictures: Callable[[str], bytes | None] | None) -> str:
    """The page as text.

    Args:
        found: what to show.
        pictures: gives the JPEG file of a picture by its name, or None; None: only names and scores are shown.
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


def _picture(name: str, pictures: Callable[[str], bytes | None] | None) -> str:
    found = None if pictures is None else pictures(name)
    if found is None:
        return "no picture"
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(found).decode()}">'
