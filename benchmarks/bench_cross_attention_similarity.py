"""cross_attention_similarity: pytest benchmarks/bench_cross_attention_similarity.py --benchmark-group-by=param:shape"""

import torch

import itm_fast
from benchmarks import ops


@ops.over("cross_attention_similarity")
def bench_cross_attention_similarity(benchmark, shape, backend, backward):
    image, words, cu_seqlens = ops.features(shape)
    weight, bias = torch.randn(256, image.shape[2], device=image.device), torch.zeros(256, device=image.device)

    def call(image, words, weight, bias):
        return itm_fast.cross_attention_similarity(image, words, cu_seqlens, weight, bias)

    ops.run(benchmark, shape, backend, backward, call, [image, words, weight, bias])
