"""similarity_graph_score: pytest benchmarks/bench_similarity_graph_score.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops
from itm_fast.models.sgraf import EncoderSimilarity


@ops.over("similarity_graph_score")
def bench_similarity_graph_score(benchmark, shape, backend, backward):
    image, words, cu_seqlens = ops.features(shape)
    scorer = EncoderSimilarity(image.shape[2], 256, "SGR").to(image.device).eval()
    image_global, caption_global = scorer.image_state(image)[1], scorer.caption_state(words, cu_seqlens)[0]
    local, overall, score = scorer.sim_tranloc_w, scorer.sim_tranglo_w, scorer.sim_eval_w
    parameters = [local.weight, local.bias, overall.weight, overall.bias, *scorer.SGR_module.stacked()]

    def call(*args):
        return itm_fast.similarity_graph_score(*args[:4], cu_seqlens, *args[4:])

    leaves = [image, image_global, words, caption_global, *parameters, score.weight[0], score.bias]
    ops.run(benchmark, shape, backend, backward, call, leaves)
