"""global_local_score: pytest benchmarks/bench_global_local_score.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops


@ops.over("global_local_score")
def bench_global_local_score(benchmark, shape, backend, backward):
    image, words, cu_seqlens = ops.features(shape)

    def call(vector, words):
        return itm_fast.global_local_score(vector, words, cu_seqlens)

    ops.run(benchmark, shape, backend, backward, call, [image[:, 0], words])
