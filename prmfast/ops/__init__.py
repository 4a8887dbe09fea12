"""The ops: one contract each (checks, dispatch, fake, autograd) over several backends that cannot drift apart."""

from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops._backends import available, resolve
from prmfast.ops.ias import ias_allocate, ias_budget, ias_curve
from prmfast.ops.picnn import picnn_map

__all__ = ["PicnnParams", "available", "ias_allocate", "ias_budget", "ias_curve", "picnn_map", "resolve"]
