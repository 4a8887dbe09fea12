"""Training losses of process reward models: finite for finite scores, indifferent to padding, 0 for empty sets."""

from prmfast.prm.losses.implicit import (
    dpo_rm_loss,
    endogenous_rewards,
    implicit_prm_loss,
    ipvrm_loss,
    prefix_value_loss,
    prefix_values,
    q_rm_loss,
    token_log_ratio,
)
from prmfast.prm.losses.online import OnlineTerms, online_ipvrm_loss, online_terms
from prmfast.prm.losses.pointwise import bce_loss, mse_loss, orm_loss
from prmfast.prm.losses.pqm import pqm_loss, released_pqm_loss
from prmfast.prm.losses.quantile import weighted_quantile_loss

__all__ = [
    "OnlineTerms",
    "bce_loss",
    "dpo_rm_loss",
    "endogenous_rewards",
    "implicit_prm_loss",
    "ipvrm_loss",
    "mse_loss",
    "online_ipvrm_loss",
    "online_terms",
    "orm_loss",
    "pqm_loss",
    "prefix_value_loss",
    "prefix_values",
    "q_rm_loss",
    "released_pqm_loss",
    "token_log_ratio",
    "weighted_quantile_loss",
]
