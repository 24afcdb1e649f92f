"""hierarchical_alignment_score, with both kinds of gate:

pytest benchmarks/bench_hierarchical_alignment_score.py --benchmark-group-by=param:shape
"""

import pytest
import torch

import itm_fast
from benchmarks import ops


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@ops.over("hierarchical_alignment_score")
def bench_hierarchical_alignment_score(benchmark, shape, backend, backward, gate):
    image, words, cu_seqlens = ops.features(shape)
    D = image.shape[2]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator).to(image.device)  # noqa: E731
    region, word, K = draw(D, D) / D**0.5, draw(D, D) / D**0.5, 1 if gate == "scalar" else D
    unit = torch.nn.functional.normalize
    of_image = image, unit(image @ region, dim=-1), draw(*image.shape[:2], 2, K)
    of_words = words, unit(words @ word, dim=-1), draw(len(words), 2, K)

    def call(*args):
        return itm_fast.hierarchical_alignment_score(*args[:6], cu_seqlens, *args[6:])

    ops.run(benchmark, shape, backend, backward, call, [*of_image, *of_words, draw(D), draw(D)])
