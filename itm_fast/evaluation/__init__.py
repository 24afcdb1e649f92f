"""From a split and a scorer to recall: encode once, score all pairs under a memory budget, rank, report."""

from .encoding import Encoded, encode
from .memory import MemoryPlan, plan
from .pipeline import evaluate, memory_plan
from .ranking import Direction, Metrics, Ranks, average, fold_metrics, metrics, ranks
from .relevance import relevance_metrics, why_no_relevance
from .report import Pool, Report, System
from .scoring import plan_for, score_all
from .trec import write_trec
from .workloads import WORKLOADS, Workload

__all__ = [
    "WORKLOADS",
    "Direction",
    "Encoded",
    "MemoryPlan",
    "Metrics",
    "Pool",
    "Ranks",
    "Report",
    "System",
    "Workload",
    "average",
    "encode",
    "evaluate",
    "fold_metrics",
    "memory_plan",
    "metrics",
    "plan",
    "plan_for",
    "ranks",
    "relevance_metrics",
    "score_all",
    "why_no_relevance",
    "write_trec",
]
