"""The words that options take, as types for editors and type checkers; nothing here imports torch."""

from typing import Literal, get_args

Backend = Literal["auto", "triton", "cuda", "cpu", "torch", "reference"]
Direction = Literal["t2i", "i2t"]
Norm = Literal["softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "none"]
Pool = Literal["lse", "max", "sum", "mean"]
Negative = Literal["negative", "smoothed_negative"]
AnyPool = Literal[Pool, Negative]
Weights = Literal["softmax", "focal_equal", "focal_prob", "hard", "threshold"]
Similarity = Literal["cosine", "product", "projection"]
Output = Literal["score", "logit"]
Ties = Literal["pessimistic", "optimistic", "expected", "published"]

BACKENDS: tuple[str, ...] = get_args(Backend)[1:]  # the command line lists them
