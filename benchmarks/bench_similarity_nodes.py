"""similarity_nodes: pytest benchmarks/bench_similarity_nodes.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops
from itm_fast.models.sgraf import EncoderSimilarity


@ops.over("similarity_nodes")
def bench_similarity_nodes(benchmark, shape, backend, backward):
    image, words, cu_seqlens = ops.features(shape)
    scorer = EncoderSimilarity(image.shape[2], 256, "SAF").to(image.device).eval()
    image_global, caption_global = scorer.image_state(image)[1], scorer.caption_state(words, cu_seqlens)[0]
    local, overall = scorer.sim_tranloc_w, scorer.sim_tranglo_w

    def call(*args):
        return itm_fast.similarity_nodes(*args[:4], cu_seqlens, *args[4:])[0]

    leaves = [image, image_global, words, caption_global, local.weight, local.bias, overall.weight, overall.bias]
    ops.run(benchmark, shape, backend, backward, call, leaves)
