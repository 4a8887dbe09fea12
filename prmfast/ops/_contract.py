"""The checks that every op makes once, before any backend runs."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from prmfast.kernels.common.errors import nan_error

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Check:
    """``name + rule + actual value``: TypeError for kind and dtype, ValueError for shape, device and range."""

    def __init__(self, op: str) -> None:
        self.op = op

    def tensor(
        self, name: str, value: object, *, ndim: int | tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> Tensor:
        """``value`` as a tensor of one of ``dtypes`` with an allowed number of dimensions."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            raise TypeError(f"{self.op}: {name} must have dtype {_names(dtypes)}, got {_names((value.dtype,))}")
        allowed = (ndim,) if isinstance(ndim, int) else ndim
        if value.ndim not in allowed:
            shown = " or ".join(str(n) for n in allowed)
            raise ValueError(f"{self.op}: {name} must have {shown} dimension(s), got shape {tuple(value.shape)}")
        return value

    def shape(self, name: str, value: Tensor, expected: tuple[int, ...]) -> None:
        """The exact shape."""
        if tuple(value.shape) != expected:
            raise ValueError(f"{self.op}: {name} must have shape {expected}, got {tuple(value.shape)}")

    def same_device(self, first: str, a: Tensor, **others: Tensor) -> None:
        """All on the device of the first."""
        for name, b in others.items():
            if b.device != a.device:
                raise ValueError(f"{self.op}: {name} must be on {a.device} like {first}, got {b.device}")

    def integer(self, name: str, value: object, *, low: int, high: int | None = None) -> int:
        """A whole number in [low, high]; bool is not one."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.op}: {name} must be an int, got {type(value).__name__}")
        if value < low or (high is not None and value > high):
            raise ValueError(
                f"{self.op}: {name} must be >= {low}{'' if high is None else f' and <= {high}'}, got {value}"
            )
        return value

    def number(self, name: str, value: object, *, kind: str = "a number") -> float:
        """A real number; bool is not one."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{self.op}: {name} must be {kind}, got {type(value).__name__}")
        return float(value)

    def no_nan(self, name: str, value: Tensor) -> None:
        """No NaN; the error names the first row that has one."""
        bad = torch.isnan(value)
        if bool(bad.any()):
            rows = bad.reshape(value.shape[0], -1).any(1) if value.ndim else bad.reshape(1)
            raise nan_error(self.op, name, int(rows.nonzero()[0]))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
