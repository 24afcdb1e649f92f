"""cross_attention_score: pytest benchmarks/bench_cross_attention_score.py --benchmark-group-by=param:shape"""

import pytest

import itm_fast
from benchmarks import ops


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@ops.over("cross_attention_score")
def bench_cross_attention_score(benchmark, shape, backend, backward, direction):
    image, words, cu_seqlens = ops.features(shape)

    def call(image, words):
        return itm_fast.cross_attention_score(image, words, cu_seqlens, direction=direction)

    ops.run(benchmark, shape, backend, backward, call, [image, words])
