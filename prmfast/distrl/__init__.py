"""DistRL: reinforcement learning with implicit process rewards at every likely token, [V] arXiv 2604.13197.

`candidate_td` of prmfast.ops finds the candidates, `distrl_advantages` scales them, `distrl_loss` is the policy update.
Two methods go by the name, the paper's and its released program's: `AdvantageRule` and `LossRule` have both.
"""

from prmfast.distrl.advantages import (
    AdvantageRule,
    Advantages,
    distrl_advantages,
    gae,
    group_normalised_outcome,
    outcome_advantages,
)
from prmfast.distrl.analysis import pairwise_accuracy, rm_score, sign_accuracy, td_outcome_correlation
from prmfast.distrl.candidates import (
    from_table,
    likely,
    released_candidates,
    sampled_logp,
    sampled_td,
    without_last_token,
)
from prmfast.distrl.config import LoopConfig
from prmfast.distrl.filtering import Kept, filter_and_downsample, mixed_outcomes, prompt_pairs
from prmfast.distrl.loop import Loop
from prmfast.distrl.losses import DistPPO, DistRLLoss, LossRule, TokPPO, distrl_loss, linear_distrl_loss, tok_ppo_loss
from prmfast.distrl.models import HuggingFaceModel, LanguageModel, Outputs
from prmfast.distrl.penalties import suffix_geometric_mean, suffix_mean, suffix_sum, topk_kl_penalty
from prmfast.distrl.tensorboard import tensorboard_logger

__all__ = [
    "AdvantageRule",
    "Advantages",
    "DistPPO",
    "DistRLLoss",
    "HuggingFaceModel",
    "Kept",
    "LanguageModel",
    "Loop",
    "LoopConfig",
    "LossRule",
    "Outputs",
    "TokPPO",
    "distrl_advantages",
    "distrl_loss",
    "filter_and_downsample",
    "from_table",
    "gae",
    "group_normalised_outcome",
    "likely",
    "linear_distrl_loss",
    "mixed_outcomes",
    "outcome_advantages",
    "pairwise_accuracy",
    "prompt_pairs",
    "released_candidates",
    "rm_score",
    "sampled_logp",
    "sampled_td",
    "sign_accuracy",
    "suffix_geometric_mean",
    "suffix_mean",
    "suffix_sum",
    "td_outcome_correlation",
    "tensorboard_logger",
    "tok_ppo_loss",
    "topk_kl_penalty",
    "without_last_token",
]
