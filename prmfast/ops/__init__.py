"""The ops: one contract each (checks, dispatch, fake, autograd) over several backends that cannot drift apart."""

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops._backends import available, resolve
from prmfast.ops.dist_ppo import dist_ppo_loss, dist_ppo_loss_and_grad, linear_dist_ppo_loss
from prmfast.ops.ias import ias_allocate, ias_budget, ias_curve
from prmfast.ops.picnn import picnn_map

__all__ = [
    "Candidates",
    "PicnnParams",
    "available",
    "dist_ppo_loss",
    "dist_ppo_loss_and_grad",
    "ias_allocate",
    "ias_budget",
    "ias_curve",
    "linear_dist_ppo_loss",
    "picnn_map",
    "resolve",
]
