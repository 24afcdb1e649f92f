"""What `itm_fast.evaluation` offers."""

# ruff: noqa: F401

from .bootstrap import Comparison, compare
from .encoding import Encoded, encode
from .kept_ranks import KeptRanks, load_ranks
from .matrix_free import rank_all
from .memory import MemoryPlan, plan
from .pipeline import evaluate
from .planning import memory_plan
from .ranking import fold_metrics, metrics, ranks
from .rankings import Ranking
from .rating import rate
from .relevance import relevance_metrics, why_no_relevance
from .report import Pool, Report, System
from .scoring import plan_for, score, score_all
from .tie_rules import Direction, Metrics, Ranks, average
from .trec import write_trec
from .workloads import WORKLOADS, Workload
