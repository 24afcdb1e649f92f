"""The pair scorers around a head: pytest benchmarks/bench_similarity_score.py --benchmark-group-by=param:shape"""

import itm_fast
from benchmarks import ops
from itm_fast.models.sgraf import EncoderSimilarity


def _given(shape, module):
    """The model, cu_seqlens, and the arguments before the head's parameters, and those after them."""
    image, words, cu_seqlens = ops.features(shape)
    scorer = EncoderSimilarity(image.shape[2], 256, module).to(image.device).eval()
    image_global, caption_global = scorer.image_state(image)[1], scorer.caption_state(words, cu_seqlens)[0]
    local, overall, score = scorer.sim_tranloc_w, scorer.sim_tranglo_w, scorer.sim_eval_w
    first = [image, image_global, words, caption_global, local.weight, local.bias, overall.weight, overall.bias]
    return scorer, cu_seqlens, first, [score.weight[0], score.bias]


@ops.over("similarity_graph_score")
def bench_similarity_graph_score(benchmark, shape, backend, backward):
    scorer, cu_seqlens, first, last = _given(shape, "SGR")

    def call(*args):
        return itm_fast.similarity_graph_score(*args[:4], cu_seqlens, *args[4:])

    ops.run(benchmark, shape, backend, backward, call, [*first, *scorer.SGR_module.stacked(), *last])


@ops.over("similarity_filter_score")
def bench_similarity_filter_score(benchmark, shape, backend, backward):
    scorer, cu_seqlens, first, last = _given(shape, "SAF")
    gate, bn = scorer.SAF_module.attn_sim_w, scorer.SAF_module.bn

    def call(*args):
        return itm_fast.similarity_filter_score(
            *args[:4], cu_seqlens, *args[4:12], bn.running_mean, bn.running_var, *args[12:]
        )

    parameters = [gate.weight[0], gate.bias, bn.weight, bn.bias]
    ops.run(benchmark, shape, backend, backward, call, [*first, *parameters, *last])
