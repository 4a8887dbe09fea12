"""What the Triton entry points of the room share: launching, the ids that join, the error of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.reference import row_error
from prmfast.kernels.common.launch import Variant, pointers_of


@dataclass(frozen=True)
class Form:
    """A kernel with its constants: what is launched is what is compiled ahead of time."""

    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int

    def launch(self, programs: int, *arguments: Any) -> None:
        """``programs`` programs on the device of the first tensor; none are no launch."""
        if programs == 0:
            return
        first = next(a for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device_of(first):
            options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
            self.kernel[(programs,)](*arguments, **self.constants, **options)

    def variant(self, known: Mapping[str, str]) -> Variant:
        """With the types of its arguments among ``known``, and rows whose length and distance are multiples of 16."""
        types = {name: known[name] for name in self.kernel.arg_names if name not in self.constants}
        rows = tuple(name for name in types if name == "columns" or name.endswith("stride"))
        return Variant(self.kernel, types, self.constants, self.num_warps, aligned=pointers_of(types) + rows)


def scale(temperature: float) -> float:
    """What takes a difference of logits to powers of two."""
    return math.log2(math.e) / temperature


def forced_ids(sampled: Tensor | None, like: Tensor) -> Tensor:
    """int64 [T], -1 where there is none."""
    return like.new_full((len(like),), -1, dtype=torch.int64) if sampled is None else sampled.contiguous()


def raise_fault(op: str, **log_sums: Tensor) -> None:
    """ValueError of the first row of which a side's log of the sum [T] is not finite."""
    sides = torch.stack(list(log_sums.values()), 1).cpu()
    row, side = (int(i) for i in (~sides.isfinite()).nonzero()[0])
    value = float(sides[row, side])
    kind = "NaN" if value != value else "+inf" if value > 0 else "only -inf"
    raise row_error(op, list(log_sums)[side], kind, row)
