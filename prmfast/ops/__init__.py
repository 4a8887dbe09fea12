"""The ops: one contract each (checks, dispatch, fake, autograd) over several backends that cannot drift apart."""

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops._backends import available, resolve
from prmfast.ops.candidate_td import candidate_td, linear_candidate_td, token_logprob
from prmfast.ops.dist_ppo import dist_ppo_loss, dist_ppo_loss_and_grad, linear_dist_ppo_loss
from prmfast.ops.entry_logprob import entry_logprob, linear_entry_logprob
from prmfast.ops.ias import ias_allocate, ias_budget, ias_curve
from prmfast.ops.picnn import PicnnGradients, PicnnStep, picnn_map, picnn_step
from prmfast.ops.serving_head import Served, ServingHead

__all__ = [
    "Candidates",
    "PicnnGradients",
    "PicnnParams",
    "PicnnStep",
    "Served",
    "ServingHead",
    "available",
    "candidate_td",
    "dist_ppo_loss",
    "dist_ppo_loss_and_grad",
    "entry_logprob",
    "ias_allocate",
    "ias_budget",
    "ias_curve",
    "linear_candidate_td",
    "linear_dist_ppo_loss",
    "linear_entry_logprob",
    "picnn_map",
    "picnn_step",
    "resolve",
    "token_logprob",
]
