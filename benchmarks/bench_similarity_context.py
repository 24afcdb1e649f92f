"""similarity_context: pytest benchmarks/bench_similarity_context.py --benchmark-group-by=param:shape"""

import torch

import itm_fast
from benchmarks import ops


@ops.over("similarity_context")
def bench_similarity_context(benchmark, shape, backend, backward):
    local, cu_seqlens = ops.nodes(shape, 256)
    overall, assignment = local[:, : len(cu_seqlens) - 1].contiguous(), torch.randn(5, 256, device=local.device)

    def call(overall, local, assignment):
        return itm_fast.similarity_context(overall, local, cu_seqlens, assignment, (4, 1))

    ops.run(benchmark, shape, backend, backward, call, [overall, local, assignment])
