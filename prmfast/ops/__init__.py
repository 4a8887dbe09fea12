"""The ops: one contract each (checks, dispatch, fake, autograd) over several backends that cannot drift apart."""

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops._backends import available, resolve
from prmfast.ops.candidate_td import candidate_td, linear_candidate_td, token_logprob
from prmfast.ops.ias import ias_allocate, ias_budget, ias_curve
from prmfast.ops.picnn import picnn_map

__all__ = [
    "Candidates",
    "PicnnParams",
    "available",
    "candidate_td",
    "ias_allocate",
    "ias_budget",
    "ias_curve",
    "linear_candidate_td",
    "picnn_map",
    "resolve",
    "token_logprob",
]
