"""The processes that share one batch: what is gathered and summed between them; nothing happens where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from prmfast.distrl.candidates import slice_rows
from prmfast.ops import Candidates

T = TypeVar("T")


class Processes:
    """Every process makes the same calls in the same order.

    accelerator: an `accelerate.Accelerator`, whose device the tensors are on; None for one process.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.index = 0 if accelerator is None else int(accelerator.process_index)

    @property
    def main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.index == 0

    def share(self, n: int) -> slice:
        """This process's contiguous part of n things; parts differ by one at most."""
        return slice(self.index * n // self.count, (self.index + 1) * n // self.count)

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of each process, n as it may be -> those of all, one process after the other."""
        if self.count == 1:
            return values
        counts = self._counts(len(values))
        if not max(counts):
            return values
        padded = values.new_zeros(max(counts), *values.shape[1:])
        padded[: len(values)] = values
        parts = self.accelerator.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def joined(self, own: Tensor) -> Tensor:
        """As `gather`, differentiable in this process's part."""
        if self.count == 1:
            return own
        every, rows = self.gather(own.detach()), self.own_rows(len(own))
        return torch.cat([every[: rows.start], own, every[rows.stop :]])

    def own_rows(self, n: int) -> slice:
        """Where this process's n rows stand among the gathered ones."""
        start = sum(self._counts(n)[: self.index])
        return slice(start, start + n)

    def gather_candidates(self, own: Candidates) -> Candidates:
        """The rows of all processes."""
        if self.count == 1:
            return own
        counts = self.gather(own.offsets.diff())
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Candidates(offsets, *(self.gather(part) for part in own[1:]))

    def own_candidates(self, every: Candidates, rows: slice) -> Candidates:
        """The rows of this process again."""
        if self.count == 1:
            return every
        return slice_rows(every, rows.start, rows.stop)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise, over the processes."""
        return values if self.count == 1 else self.accelerator.reduce(values, reduction="sum")

    def objects(self, item: T) -> list[T]:
        """One picklable thing of each process."""
        if self.count == 1:
            return [item]
        from accelerate.utils import gather_object

        found: list[T] = gather_object([item])
        return found

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by the sum of the processes'."""
        if self.count == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.sum(gradient)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """In place: every process has what the main one has."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            held = tensor.detach()
            held.copy_(broadcast(held.clone()))

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def _counts(self, n: int) -> list[int]:
        if self.count == 1:
            return [n]
        counts: list[int] = self.accelerator.gather(torch.tensor([n], device=self.accelerator.device)).tolist()
        return counts
