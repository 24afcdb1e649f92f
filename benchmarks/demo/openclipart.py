"""Pictures and captions from Debian's openclipart packages.

Every picture is a PNG of `openclipart-png`; its title, description and keywords stand in the RDF block of the SVG of
the same name in `openclipart-svg`. `read_pictures` keeps the pictures whose own RDF dedicates them to the public
domain (the packages carry a few that say otherwise or nothing) and that have something to say, and writes one to
three captions for each.
"""

from __future__ import annotations

import hashlib
import html
import re
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("openclipart-png", "openclipart-svg")
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")

# A text carried by more pictures than this names a collection, not what a picture shows.
MAX_SHARED = 3
MAX_WORDS = 24
MAX_KEYWORDS = 5  # beside the title; more make a caption of their own
# A few drawings were rendered at poster size; they take seconds and a gigabyte each.
MAX_PIXELS = 30_000_000

# Wholly decorative folders, marks that belong to somebody, and texts that insult somebody.
LEFT_OUT_FOLDERS = ("shapes/stars", "special/gradients", "people/clothing/pantyhose", "logos")
LEFT_OUT_WORDS = frozenset({"sex", "sexy", "weed", "chav", "pimp", "nazi", "swastika", "batasuna"})

# Keywords that sort a library and describe nothing, or that a broken upload left behind.
EMPTY_KEYWORDS = frozenset((
    "hash", "unsorted", "openclipart", "appicon", "mapsym", "networksym", "clipart", "clip_art", "sign",
    "signs_and_symbols", "icon", "icons", "theme", "action", "application", "device", "filesystem", "mimetypes",
    "mime-types", "lemon_theme_icon", "special", "other", "misc", "stock", "united_nations_member", "activities",
    "svg", "inkscape", "public_domain", "image", "picture", "vector",
))  # fmt: skip
BOILERPLATE = re.compile(
    r"eps converted|https?:|www\.|@|<[^>]+>|hash\(0x|made (with|in) |creat\w* (with|in) |inkscape|sodipodi|svg"
    r"|public domain|open ?clip ?art|clipart|creative commons|copyright|licen[cs]e|this is my|submission|derivati"
    r"|contact:|icons? collection|part of the|feel free|please |rollandin|architetto",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Picture:
    """One picture: where it lies, a digest of its file, and its captions (1 to 3)."""

    name: str
    path: Path
    digest: str
    captions: tuple[str, ...]


def unpack(packages: Path | None, folder: Path) -> Path:
    """Unpack the two packages into `folder` and return the `openclipart` folder in it.

    Args:
        packages: folder that holds the two .deb files; None downloads them with `apt-get download`.
        folder: an empty folder.

    Raises:
        FileNotFoundError: a package is not in `packages`.
        subprocess.CalledProcessError: apt-get or dpkg-deb failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
        for name in PACKAGES:
            found = sorted(packages.glob(f"{name}_*.deb"))
            if not found:
                raise FileNotFoundError(f"no {name}_*.deb in {packages}; `apt-get download {name}` fetches it")
            subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(folder)], check=True)
    return folder / "usr/share/openclipart"


def read_pictures(root: Path) -> list[Picture]:
    """The pictures below `root` that have at least one caption, sorted by name.

    A picture that is filed in several folders (as a link or as a copy) counts once, under its first name.
    """
    texts: dict[str, tuple[str, Path, tuple[str, str, list[str]]]] = {}
    for svg in sorted((root / "svg").rglob("*.svg")):
        name = svg.relative_to(root / "svg").with_suffix("").as_posix()
        png = root / "png" / f"{name}.png"
        if not png.exists() or name.startswith(LEFT_OUT_FOLDERS):
            continue
        work = _work(svg)
        if work is None:
            continue
        content = png.read_bytes()
        if int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big") > MAX_PIXELS:
            continue
        digest = hashlib.sha256(content).hexdigest()
        texts.setdefault(digest, (name, png.resolve(), work))

    shared: Counter[str] = Counter()
    for _, _, (title, description, keywords) in texts.values():
        shared.update({_key(title), _key(description), _key(" ".join(keywords))})

    pictures = []
    for digest, (name, png, (title, description, keywords)) in texts.items():
        captions = _captions(
            title if shared[_key(title)] <= MAX_SHARED else "",
            description if shared[_key(description)] <= MAX_SHARED else "",
            keywords,
            own=shared[_key(" ".join(keywords))] <= MAX_SHARED,
        )
        if captions and not _words(" ".join(captions)) & LEFT_OUT_WORDS:
            pictures.append(Picture(name, png, digest, captions))
    return sorted(pictures, key=lambda picture: picture.name)


def _captions(title: str, description: str, keywords: list[str], own: bool) -> tuple[str, ...]:
    """One to three captions: title with keywords, description, further keywords, as far as each adds something.

    Args:
        title, description: empty when there is none worth keeping.
        keywords: in their order.
        own: whether the keywords are this picture's rather than a whole collection's.
    """
    new = [word for word in keywords if not _words(word) <= _words(title)]
    first, rest = new[:MAX_KEYWORDS], new[MAX_KEYWORDS:]
    if not title and not own:
        first, rest = [], []
    found: list[str] = []
    for caption, fewest in ((", ".join([title] * bool(title) + first), 2), (description, 3), (", ".join(rest), 3)):
        words = _words(caption)
        if len(words) >= fewest and not any(words <= _words(other) for other in found):
            found.append(caption)
    return tuple(found)


def _work(svg: Path) -> tuple[str, str, list[str]] | None:
    """(title, description, keywords) of a public-domain SVG, cleaned; None for any other file."""
    try:
        tree = ET.parse(svg).getroot()
    except ET.ParseError:
        return None
    local = lambda element: element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""  # noqa: E731
    work = next((element for element in tree.iter() if local(element) == "Work"), None)
    if work is None:
        return None
    licences = [value for child in work if local(child) == "license" for value in child.attrib.values()]
    if not licences or not all(licence.startswith(PUBLIC_DOMAIN) for licence in licences):
        return None
    fields = {local(child): child for child in reversed(list(work))}
    plain = {key: "".join(fields[key].itertext()) if key in fields else "" for key in ("title", "description")}
    subject = fields.get("subject")
    raw = [] if subject is None else [text for text in subject.itertext() if text.strip()]
    keywords: list[str] = []
    for text in raw:
        for word in re.split(r"[,;/]| {3,}", text):
            cleaned = _clean(word)
            if _says_something(word, cleaned) and cleaned not in keywords:
                keywords.append(cleaned)
    return _title(plain["title"]), _description(plain["description"]), keywords[:12]


def _says_something(word: str, cleaned: str) -> bool:
    lowered = word.strip().lower()
    return (
        lowered not in EMPTY_KEYWORDS
        and not BOILERPLATE.search(lowered)
        and not re.search(r"0x[0-9a-f]+", lowered)
        and bool(WORD.search(cleaned))
        and len(cleaned) <= 25
    )


def _title(text: str) -> str:
    text = re.sub(r"^clipart by .*? - ", "", _unescape(text), flags=re.IGNORECASE)
    text = re.sub(r"\(b and w\)|\bbw\b|_bw\b", " black and white", text, flags=re.IGNORECASE)
    # A number at the end counts a series: "Tigre04", "horse#1", "Cavallo 02".
    text = re.sub(r"(?<=\w\w)[\s_#-]*\d+\s*$", "", text.strip())
    return "" if BOILERPLATE.search(text) else _shorten(_clean(text))


def _description(text: str) -> str:
    sentences = re.split(r"(?<=[.!?])\s+|\n+", _unescape(text))
    return _shorten(_clean(" ".join(sentence for sentence in sentences if not BOILERPLATE.search(sentence))))


def _unescape(text: str) -> str:
    """Undo entities (twice, as some files were escaped twice) and UTF-8 read as Latin-1."""
    text = html.unescape(html.unescape(text))
    try:
        return text.encode("latin-1").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return text


def _clean(text: str) -> str:
    """Lower case, words separated by single spaces, only letters, digits, commas and apostrophes.

    Full stops become commas: a caption is one sentence to every tokeniser.
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text).lower()
    text = re.sub(r"(?<=\w)[.!?;:](?=\s|$)", ",", text)
    text = re.sub(r"[^\w\s,'&]|_", " ", text)
    text = re.sub(r"\s+'(?=s\b)", "'", text)
    return re.sub(r"\s*,[\s,]*", ", ", " ".join(text.split())).strip(" ,&'")


def _shorten(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS]).strip(" ,&'")


def _words(text: str) -> set[str]:
    return set(WORD.findall(text))


def _key(text: str) -> str:
    return " ".join(WORD.findall(text))
