"""Instance-adaptive scaling: how many samples a question deserves, drawn live or replayed from stored ones."""

from prmfast.ias._beam_result import BeamAnswer, BeamCandidate, BeamSearchResult, BeamStep
from prmfast.ias._journal import Sample
from prmfast.ias._pool import ReplayPool
from prmfast.ias.async_best_of_n import AsyncBestOfN
from prmfast.ias.beam_search import BeamSearch, BeamSettings, has_boxed_answer
from prmfast.ias.best_of_n import Answer, BestOfN, BestOfNResult, Decision, aggregate_score
from prmfast.ias.controller import BestOfNController
from prmfast.ias.estimates import QuestionEstimates
from prmfast.ias.judges import BatchingJudge, ScorerJudge
from prmfast.ias.policies import (
    BetaThresholdBudget,
    BudgetPolicy,
    BudgetState,
    FixedBudget,
    GlobalBudget,
    PointBudget,
    TargetBudget,
    TauStopping,
)
from prmfast.ias.posterior import SuccessPosterior
from prmfast.ias.released import compute_n_ias, determine_k, determine_m
from prmfast.ias.replay import Frontier, FrontierRow, replay
from prmfast.ias.voting import majority_vote, weighted_vote

__all__ = [
    "Answer",
    "AsyncBestOfN",
    "BatchingJudge",
    "BeamAnswer",
    "BeamCandidate",
    "BeamSearch",
    "BeamSearchResult",
    "BeamSettings",
    "BeamStep",
    "BestOfN",
    "BestOfNController",
    "BestOfNResult",
    "BetaThresholdBudget",
    "BudgetPolicy",
    "BudgetState",
    "Decision",
    "FixedBudget",
    "Frontier",
    "FrontierRow",
    "GlobalBudget",
    "PointBudget",
    "QuestionEstimates",
    "ReplayPool",
    "Sample",
    "ScorerJudge",
    "SuccessPosterior",
    "TargetBudget",
    "TauStopping",
    "aggregate_score",
    "compute_n_ias",
    "determine_k",
    "determine_m",
    "has_boxed_answer",
    "majority_vote",
    "replay",
    "weighted_vote",
]
