"""Which model a gallery is of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.encoding import weights_checksum
from .files import About

if TYPE_CHECKING:
    from ..data import Vocabulary
    from ..models import Loaded


def require_loaded(model: Any) -> Loaded:
    """Refuse anything but what `itm_fast.models.load` returns."""
    from ..models import Loaded

    if not isinstance(model, Loaded):
        raise TypeError(f"a gallery takes a model as itm_fast.models.load(path) returns it, got {type(model).__name__}")
    return model


def require_words(model: Loaded) -> Vocabulary:
    """The model's vocabulary; refuse a model without."""
    if model.vocab is None:
        raise ValueError(
            f"the {model.name} model was loaded without its vocabulary, which turns captions into word ids; load it "
            "with itm_fast.models.load(path, vocab=FILE) (--vocab FILE)"
        )
    return model.vocab


def checksums(model: Loaded) -> dict[str, str]:
    """The model's name, and a checksum of the weights and options of each part."""
    matcher: Any = model.model
    parts = {"image encoder": matcher.img_enc, "text encoder": matcher.txt_enc, "scorer": matcher.scorer}
    return {"name": model.name, **{name: weights_checksum(part) for name, part in parts.items()}}


def require_model(path: Path, about: About, model: Loaded) -> None:
    """Refuse another model than the one that the gallery was built with."""
    mine = checksums(model)
    differ = [part for part, value in mine.items() if part != "name" and about.model.get(part) != value]
    if differ:
        raise ValueError(
            f"{path} was built with another checkpoint ({about.model.get('name')}) than this one ({model.name}): "
            f"{', '.join(differ)} {'differ' if len(differ) > 1 else 'differs'}. Open it with the one that it was built "
            "with, or build another gallery"
        )
