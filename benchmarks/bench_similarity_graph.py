"""similarity_graph: pytest benchmarks/bench_similarity_graph.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops
from itm_fast.nn import SimilarityGraph


@ops.over("similarity_graph")
def bench_similarity_graph(benchmark, shape, backend, backward):
    nodes, cu_seqlens = ops.nodes(shape, 256)
    weights = [w.detach() for w in SimilarityGraph(256, 3).to(nodes.device).stacked()]

    def call(nodes, *weights):
        return itm_fast.similarity_graph(nodes, cu_seqlens, *weights)

    ops.run(benchmark, shape, backend, backward, call, [nodes, *weights])
