"""`similarity_graph` in Triton: equations in `ops/similarity_graph.py`.

Forward, for each block of images and captions: every step but the last at all nodes (`_graph._step`), the last step at
the global nodes (`_graph._dense`, `_read`, `_dense`). Scratch: two copies of a block's nodes.

Backward computes the nodes of all steps again, then goes through the steps in reverse. `_graph_backward` computes (5)
and (6) within captions; torch computes the products of all nodes with the weights, (4) and (6), and the weights'
gradients, which are summed over blocks in float32.
"""

from __future__ import annotations

from torch import Tensor

from . import _graph, _graph_backward, _launch

OP = "similarity_graph"


def forward(nodes: Tensor, *rest: Tensor) -> Tensor:
    query_weight, query_bias, key_weight, _, value_weight, value_bias, cu_seqlens = rest
    (I, M, S), T = nodes.shape, len(cu_seqlens) - 1
    z = nodes.new_empty(I, T, S)
    x = _graph.Rows(_launch.aligned(nodes), 0, M, 0)
    room = _graph.node_bytes(S, nodes.dtype, min(2, len(query_weight) - 1))
    with _launch.on(nodes.device):
        weights = _graph.fold(query_weight, query_bias, key_weight, value_weight, value_bias)
        for first, block in _graph.blocks(I, cu_seqlens, M, OP, _graph.sizes(weights), room):
            _graph.reason(weights, x._replace(first=first), _graph.Rows(z, first, T, 0), block)
    return z


def backward(grad: Tensor, needs: list[bool], nodes: Tensor, *rest: Tensor) -> list[Tensor]:
    query_weight, query_bias, key_weight, _, value_weight, value_bias, cu_seqlens = rest
    (I, M, S), K = nodes.shape, len(query_weight)
    d_nodes = nodes.new_empty(nodes.shape) if needs[0] else None
    with _launch.on(nodes.device):
        weights = _graph.fold(query_weight, query_bias, key_weight, value_weight, value_bias)
        walk = _graph_backward.Walk(weights, any(needs[1:]))
        room = _graph.node_bytes(S, nodes.dtype, K + 9)
        for first, block in _graph.blocks(I, cu_seqlens, M, OP, _graph.sizes(weights, backward=True), room):
            images, window = slice(first, first + block.images), block.window
            part = walk(nodes[images, window.rows], grad[images, window.captions], block)
            if d_nodes is not None:
                d_nodes[images, window.rows] = part
        found = d_nodes, *walk.unfold(query_weight, query_bias, key_weight)
    return [d for d, n in zip(found, needs, strict=True) if n and d is not None]
