"""From a split and a scorer to recall: encode once, score all pairs under a memory budget, rank, report."""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from ._public import *

TIES = ("pessimistic", "optimistic", "expected", "published")  # the rules for ties; see `ranking`

__all__ = [
    "WORKLOADS",
    "Comparison",
    "Direction",
    "Encoded",
    "KeptRanks",
    "MemoryPlan",
    "Metrics",
    "Pool",
    "Ranking",
    "Ranks",
    "Report",
    "System",
    "Workload",
    "average",
    "compare",
    "encode",
    "evaluate",
    "fold_metrics",
    "load_ranks",
    "memory_plan",
    "metrics",
    "plan",
    "plan_for",
    "rank_all",
    "ranks",
    "rate",
    "relevance_metrics",
    "score",
    "score_all",
    "why_no_relevance",
    "write_trec",
]

__getattr__ = lazy(__name__, __all__)
