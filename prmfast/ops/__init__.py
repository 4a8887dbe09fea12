"""The ops: one contract each (checks, dispatch, fake, autograd) over several backends that cannot drift apart."""

from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops._backends import available, resolve
from prmfast.ops.ias import ias_allocate, ias_budget, ias_curve
from prmfast.ops.picnn import PicnnGradients, PicnnStep, picnn_map, picnn_step

__all__ = [
    "PicnnGradients",
    "PicnnParams",
    "PicnnStep",
    "available",
    "ias_allocate",
    "ias_budget",
    "ias_curve",
    "picnn_map",
    "picnn_step",
    "resolve",
]
