"""Numbers of things in messages."""

from __future__ import annotations


def several(count: int, thing: str) -> str:
    """A number of things, in the plural unless there is one.

    >>> several(1, "image"), several(1000, "image")
    ('1 image', '1,000 images')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
