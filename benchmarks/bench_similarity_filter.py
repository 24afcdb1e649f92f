"""similarity_filter: pytest benchmarks/bench_similarity_filter.py --benchmark-group-by=param:shape"""

import torch

import itm_fast
from benchmarks import ops


@ops.over("similarity_filter")
def bench_similarity_filter(benchmark, shape, backend, backward):
    nodes, cu_seqlens = ops.nodes(shape, 256)
    weight, one = torch.randn(256, device=nodes.device), torch.ones(1, device=nodes.device)

    def call(nodes, weight):
        return itm_fast.similarity_filter(nodes, cu_seqlens, weight, 0 * one, one, 0 * one, 0 * one, one)[0]

    ops.run(benchmark, shape, backend, backward, call, [nodes, weight])
