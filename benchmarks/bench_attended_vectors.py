"""attended_vectors: pytest benchmarks/bench_attended_vectors.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops


@ops.over("attended_vectors")
def bench_attended_vectors(benchmark, shape, backend, backward):
    image, words, cu_seqlens = ops.features(shape)

    def call(image, words):
        return itm_fast.attended_vectors(image, words, cu_seqlens)

    ops.run(benchmark, shape, backend, backward, call, [image, words])
