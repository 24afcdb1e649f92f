"""Sizes and SHA-256 sums of the shipped files: `itm_fast/data/openclipart/MANIFEST.json`.

python benchmarks/demo/manifest.py --check
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[2] / "itm_fast/data/openclipart"
NAME = "MANIFEST.json"


def sums(folder: Path) -> dict[str, dict[str, int | str]]:
    """Name -> bytes and sha256 of every data file in `folder`."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != NAME and path.suffix not in (".py", ".md"):
            content = path.read_bytes()
            found[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return found


def write(folder: Path = SHIPPED) -> None:
    """Write the manifest of `folder` anew."""
    (folder / NAME).write_text(json.dumps(sums(folder), indent=1) + "\n")


def differences(folder: Path = SHIPPED) -> list[str]:
    """One sentence for every file that is missing, changed or not in the manifest."""
    noted, found = json.loads((folder / NAME).read_text()), sums(folder)
    return [
        f"{name}: {'missing' if name not in found else 'not in the manifest' if name not in noted else 'changed'}"
        for name in sorted(noted.keys() | found.keys())
        if noted.get(name) != found.get(name)
    ]


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        sys.exit(__doc__)
    problems = differences()
    print("\n".join(problems) or f"{SHIPPED.name}: every file is as the manifest says")
    sys.exit(bool(problems))
