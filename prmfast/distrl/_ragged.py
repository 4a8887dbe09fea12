"""Sequences of different length, padded or packed, behind one set of sums: every statistic is written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.kernels.common.errors import nan_error

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the N valid tokens of S sequences stand in a tensor of ``shape``.

    place: int64 [N] index of each valid token in the flattened tensor, sequence by sequence.
    sequence: int64 [N] its sequence. count: int64 [S] valid tokens of each sequence.
    """

    shape: tuple[int, ...]
    place: Tensor
    sequence: Tensor
    count: Tensor

    @property
    def sequences(self) -> int:
        """S, sequences without a valid token included."""
        return len(self.count)

    @property
    def rows(self) -> int:
        """Rows of the flattened tensor, padding included."""
        return int(torch.Size(self.shape).numel())

    @property
    def ends(self) -> Tensor:
        """int64 [sequences with a token]: index among the valid tokens of each sequence's last one."""
        filled = self.count[self.count > 0]
        ends: Tensor = filled.cumsum(0) - 1
        return ends

    def pack(self, values: Tensor) -> Tensor:
        """Values of ``shape`` -> [N]."""
        return values.reshape(-1)[self.place]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N] -> ``shape``, 0 at padding."""
        return packed.new_zeros(self.rows).index_copy(0, self.place, packed).reshape(self.shape)

    def sums(self, packed: Tensor) -> Tensor:
        """Sum of each sequence, [S]."""
        return packed.new_zeros(self.sequences).index_add(0, self.sequence, packed)

    def prefix_sums(self, packed: Tensor) -> Tensor:
        """Cumulative sum within each sequence, [N]: a sum of its own tokens, whatever stands beside it in the batch."""
        return self._scan(packed.flip(0), self.sequence.flip(0), 1.0).flip(0)

    def discounted_suffix_sums(self, packed: Tensor, factor: float) -> Tensor:
        """y_t = x_t + factor * y_(t+1) within each sequence, [N]."""
        return self._scan(packed, self.sequence, factor)

    def _scan(self, out: Tensor, sequence: Tensor, factor: float) -> Tensor:
        """Suffix sums in log2(longest sequence) doubling steps."""
        longest, reach = int(self.count.max()) if len(out) else 0, 1
        while reach < longest and factor:
            same = sequence[reach:] == sequence[:-reach]
            ahead = torch.where(same, out[reach:], 0.0)
            out = torch.cat([out[:-reach] + factor * ahead, out[-reach:]])
            reach, factor = 2 * reach, factor * factor
        return out


def layout(op: str, name: str, like: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Layout:
    """The layout of ``like``: padded [B, T] with a bool mask (None: all valid), or packed [N] with offsets [S + 1]."""
    if not isinstance(like, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(like).__name__}")
    if offsets is not None:
        if mask is not None:
            raise ValueError(f"{op}: mask and offsets must not both be given (padded or packed)")
        return _packed(op, name, like, offsets)
    if like.ndim != 2:
        what = "[B, T], or [N] with offsets"
        raise ValueError(f"{op}: {name} must be {what}, got shape {tuple(like.shape)}")
    if mask is None:
        mask = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype).removeprefix("torch.") if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, got {got}")
    if mask.shape != like.shape:
        raise ValueError(f"{op}: mask must have shape {tuple(like.shape)} like {name}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{op}: mask must be on {like.device} like {name}, got {mask.device}")
    sequence, _ = mask.nonzero(as_tuple=True)
    return Layout(tuple(like.shape), mask.reshape(-1).nonzero()[:, 0], sequence, mask.sum(1))


def _packed(op: str, name: str, like: Tensor, offsets: Tensor) -> Layout:
    if like.ndim != 1:
        raise ValueError(f"{op}: {name} must be [N] where offsets are given, got shape {tuple(like.shape)}")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        got = str(offsets.dtype).removeprefix("torch.") if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{op}: offsets must be an int64 tensor, got {got}")
    if offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError(f"{op}: offsets must be [S + 1], got shape {tuple(offsets.shape)}")
    if offsets.device != like.device:
        raise ValueError(f"{op}: offsets must be on {like.device} like {name}, got {offsets.device}")
    count = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(like) or bool((count < 0).any()):
        rule = f"must rise from 0 to the {len(like)} tokens of {name}"
        raise ValueError(f"{op}: offsets {rule}, got {offsets.tolist() if len(offsets) <= 8 else offsets[:8].tolist()}")
    place = torch.arange(len(like), device=like.device)
    sequence = torch.arange(len(count), device=like.device).repeat_interleave(count)
    return Layout((len(like),), place, sequence, count)


def finite(op: str, name: str, value: Tensor) -> None:
    """No NaN and no infinity; the error names the first valid token (or sequence) that has one."""
    bad = ~value.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        if bool(value[row].isnan()):
            raise nan_error(op, name, row)
        raise ValueError(f"{op}: {name} must be finite, got {float(value[row])} in row {row}")


def per_sequence(op: str, name: str, value: Tensor, sequences: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor [S] of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if tuple(value.shape) != (sequences,):
        raise ValueError(f"{op}: {name} must have shape {(sequences,)}, one per sequence, got {tuple(value.shape)}")
    return value


def group_index(op: str, group: Tensor, sequences: int) -> tuple[Tensor, int]:
    """int64 ids [S] of any values -> index [S] of each sequence's group, and the number of groups."""
    per_sequence(op, "group", group, sequences, (torch.int64,))
    distinct, index = group.unique(return_inverse=True)
    return index, len(distinct)


def group_mean_std(values: Tensor, index: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each group, [groups] each; 0 for a group without values."""
    count = values.new_zeros(groups).index_add(0, index, torch.ones_like(values)).clamp(min=1.0)
    mean = values.new_zeros(groups).index_add(0, index, values) / count
    square = values.new_zeros(groups).index_add(0, index, (values - mean[index]).square())
    return mean, (square / count).sqrt()
