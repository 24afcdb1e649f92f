"""`itm_fast.attention`: what a trained model attends to in an image and a caption."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..nn import Attention
from ._boxes import tensor_of
from ._common import Matcher
from ._inputs import features_for

if TYPE_CHECKING:
    from ..data import Vocabulary


@torch.no_grad()
def attention(
    model: Matcher,
    image: Tensor | np.ndarray[Any, Any],
    caption: str,
    vocab: Vocabulary,
    boxes: Tensor | np.ndarray[Any, Any] | None = None,
) -> Attention:
    """What a model attends to in one image and one caption.

    Args:
        model: a trained model of `itm_fast.models`, in evaluation mode.
        image: features [R, F], without regions that are padding.
        caption: text.
        vocab: the vocabulary that the model was trained with.
        boxes: of the regions, [R, 4], as parts of the picture; read by CMCAN alone.

    Returns:
        `itm_fast.nn.Attention`: the weights by name, the pair's score that follows from them, and the tokens. SCAN has
        `regions` [W, R] (t2i) or `words` [R, W] (i2t). SGR and SAF have `regions` and `nodes` [1 + W], the share of the
        whole picture and of each word in the score: SAF's gates, and in SGR what reaches node 0 by the edges of all
        steps; SGR has these `edges` [K, 1 + W, 1 + W] too. SHAN has `regions`, `words` and the shares of words and
        regions in its context vectors, `word_pool` [W] and `region_pool` [R]. Other models: `attention` of their pair
        scorer.

    Raises:
        ValueError: the image has another shape, the caption is empty, `vocab` is None, or the model is in training
            mode.
        TypeError: `model` is no model, or the caption no text.
        NotImplementedError: the model weighs nothing.

    >>> import itm_fast
    >>> from itm_fast.data import open_split
    >>> from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
    >>> loaded = itm_fast.models.load(CHECKPOINTS["saf"], "cpu")
    >>> features = open_split(FOLDER, "test").features
    >>> found = itm_fast.attention(loaded.model, features[:1][0], "a red apple", loaded.vocab)
    >>> found.tokens
    ('<start>', 'a', 'red', 'apple', '<end>')
    >>> [(name, list(weights.shape)) for name, weights in found.weights.items()]
    [('regions', [5, 36]), ('nodes', [6])]
    """
    from ..data import encode_caption, tokenize

    if not isinstance(model, Matcher):
        raise TypeError(
            f"attention: model must be one of itm_fast.models, got {type(model).__name__}; of what "
            "itm_fast.models.load returns give .model"
        )
    if not isinstance(caption, str):
        raise TypeError(f"attention: caption must be one text, got {type(caption).__name__}")
    if vocab is None:
        raise ValueError("attention: vocab is None; load the model with it: itm_fast.models.load(path, vocab=FILE)")
    features = tensor_of(image).to(next(model.img_enc.parameters()).dtype)
    if features.dim() != 2 or not len(features):
        raise ValueError(f"attention: image must be the features [R, F] of one image, got {list(features.shape)}")
    if not caption.strip():
        raise ValueError("attention: the caption is empty")
    if any(part.training for part in model.modules):
        raise ValueError("attention: the model is in training mode, in which dropout is drawn; call model.val_start()")
    tokens = ("<start>", *tokenize(caption), "<end>")
    ids = torch.tensor([encode_caption(caption, vocab)], device=model.device)
    regions = model.img_enc(features_for("attention", features[None], model.img_enc, model.device, "image"))[0]
    words = model.txt_enc(ids, [ids.shape[1]])[0]  # type: ignore[attr-defined]
    given: list[Tensor] = [regions, words.reshape(-1, words.shape[-1])]
    scorer: Any = model.scorer  # type: ignore[attr-defined]
    if getattr(scorer, "takes_boxes", False) and boxes is not None:
        given.append(tensor_of(boxes).to(model.device))
    return replace(scorer.attention(*given), tokens=tokens)
