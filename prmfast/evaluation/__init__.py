"""Judging PRMs: best-of-N, votes, pass@n and the first wrong step, on stored answers and step scores."""

from prmfast.evaluation.answers import StoredAnswer, read_answer_table, read_answers, read_scores
from prmfast.evaluation.best_of_n import (
    AGGREGATIONS,
    AnswerPool,
    best_of_n,
    pass_at_n,
    selection_table,
    trajectory_scores,
    vote_accuracies,
)
from prmfast.evaluation.first_error import (
    CrossFitted,
    FirstErrorMetrics,
    cross_fitted_first_errors,
    first_error_metrics,
    first_error_terms,
    first_errors,
    grid_threshold,
    optimal_threshold,
)
from prmfast.evaluation.from_traces import pools_from_traces
from prmfast.evaluation.processbench import Chain, first_error_table, read_chains, score_chains
from prmfast.evaluation.report import Evaluation, evaluate_answers, optimal_thresholds
from prmfast.evaluation.scoring import score_table
from prmfast.evaluation.step_rewards import released_scores, released_step_rewards
from prmfast.prm.step_rewards import step_rewards

__all__ = [
    "AGGREGATIONS",
    "AnswerPool",
    "Chain",
    "CrossFitted",
    "Evaluation",
    "FirstErrorMetrics",
    "StoredAnswer",
    "best_of_n",
    "cross_fitted_first_errors",
    "evaluate_answers",
    "first_error_metrics",
    "first_error_table",
    "first_error_terms",
    "first_errors",
    "grid_threshold",
    "optimal_threshold",
    "optimal_thresholds",
    "pass_at_n",
    "pools_from_traces",
    "read_answer_table",
    "read_answers",
    "read_chains",
    "read_scores",
    "released_scores",
    "released_step_rewards",
    "score_chains",
    "score_table",
    "selection_table",
    "step_rewards",
    "trajectory_scores",
    "vote_accuracies",
]
