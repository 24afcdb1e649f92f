"""hardest_negative_loss: pytest benchmarks/bench_hardest_negative_loss.py --benchmark-group-by=param:shape"""

import torch

import itm_fast
from benchmarks import ops
from benchmarks.shapes import SHAPES


@ops.over("hardest_negative_loss")
def bench_hardest_negative_loss(benchmark, shape, backend, backward):
    B = SHAPES[shape].captions
    score = torch.rand(B, B, generator=torch.Generator().manual_seed(0)).to(ops.DEVICE)
    ops.run(benchmark, shape, backend, backward, itm_fast.hardest_negative_loss, [score])
