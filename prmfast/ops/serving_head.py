"""Contexts -> quantiles, their mean and a budget for serving batches: one kernel launch behind the encoder, no waiting.

Importing this needs no GPU: on other devices, and for networks that the kernel does not take, torch does the same.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.kernels.common.rows import contiguous_columns
from prmfast.kernels.ias import reference as ias
from prmfast.kernels.picnn import reference
from prmfast.kernels.picnn.params import Linear, PicnnParams
from prmfast.kernels.picnn.tuning import CUDA_HEAD_INPUTS, CUDA_HEAD_LEVELS
from prmfast.ops._backends import resolve
from prmfast.ops._contract import Check

LINKS = ("sigmoid", "clip")
_CHECK = Check("ServingHead")


class Served(NamedTuple):
    """Views of a head's own memory, which its next call overwrites."""

    quantiles: Tensor  # [B, M] float32 in [0, 1], never falling from a level to the next
    expected: Tensor  # [B] float32
    budget: Tensor  # [B] int32


@dataclass(frozen=True, slots=True)
class Captured:
    """A call of fixed size: fill ``context``, call ``replay``, read ``served``."""

    context: Tensor
    served: Served
    replay: Callable[[], None]


class ServingHead:
    """Equals ``picnn_map``, the link, the trapezoid over the quantiles and ``ias_budget``, one after another.

    Weights, levels and the memory of all outputs are prepared once; a call neither allocates outputs nor waits for the
    device. A row's answer does not depend on the other rows, but for what torch's GEMMs make of an encoder.

    Args:
        params: the network, on the device to serve from; its weights are copied, as float32.
        levels: [M] in ascending order, at least two.
        target, n_max: the budget is the smallest N with ``mean_m[1 - (1 - q_m)^N] >= target``, else n_max.
        max_batch: rows that a call may have.
        link: quantiles are "sigmoid" of the map or the map itself; they are clipped to [0, 1] in both cases.
        precision: "float32", or "bfloat16" for results that may be 1e-2 off (where the kernel runs).

    Attributes:
        fused: the kernel runs; else plain torch does.
    """

    def __init__(
        self,
        params: PicnnParams,
        levels: Sequence[float] | Tensor,
        *,
        target: float,
        n_max: int,
        max_batch: int = 512,
        link: str = "sigmoid",
        precision: str = "float32",
    ) -> None:
        _CHECK.integer("n_max", n_max, low=1, high=2**31 - 1)
        _CHECK.integer("max_batch", max_batch, low=1)
        if not 0 < _CHECK.number("target", target) < 1:
            raise ValueError(f"ServingHead: target must lie in (0, 1), got {target}")
        for name, value, allowed in (("link", link, LINKS), ("precision", precision, ("float32", "bfloat16"))):
            if value not in allowed:
                raise ValueError(f"ServingHead: {name} must be one of {allowed}, got {value!r}")
        numbers = [float(level) for level in levels]
        if len(numbers) < 2 or any(not a < b for a, b in itertools.pairwise(numbers)):
            raise ValueError(f"ServingHead: levels must be at least two in ascending order, got {numbers}")
        self.params = _copied(params)
        device = self.params.wz[0].device
        self.target, self.n_max, self.link, self.max_batch = target, n_max, link, max_batch
        self.levels = torch.tensor(numbers, dtype=torch.float32, device=device)
        self.quadrature = _trapezoid(numbers).to(device)
        self._served = Served(
            torch.zeros(max_batch, len(numbers), device=device),
            torch.zeros(max_batch, device=device),
            torch.zeros(max_batch, dtype=torch.int32, device=device),
        )
        widths = self.params.widths[:-1]
        known = len(numbers) <= CUDA_HEAD_LEVELS
        self.fused = known and resolve("picnn", device, dtype=torch.float32, widths=widths) == "cuda"
        self._kernel = _Kernel(self, precision == "float32") if self.fused else None

    @torch.no_grad()
    def run(self, context: Tensor, targets: Tensor | None = None) -> Served:
        """Answers for context [B, c] of any floating dtype, B <= max_batch.

        targets: [B] float64 on the context's device, instead of the head's own target; a CUDA graph reads what this
        memory holds when it is replayed. A row with NaN has NaN as its mean and 0 as its budget.
        """
        _CHECK.tensor("context", context, ndim=2)
        _CHECK.same_device("levels", self.levels, context=context)
        count = len(context)
        if count > self.max_batch or context.shape[1] != self.params.context_width:
            raise ValueError(
                f"ServingHead: context must have shape (at most {self.max_batch}, {self.params.context_width}), "
                f"got {tuple(context.shape)}"
            )
        if targets is not None:
            _CHECK.tensor("targets", targets, ndim=1, dtypes=(torch.float64,))
            _CHECK.shape("targets", targets, (count,))
            _CHECK.same_device("levels", self.levels, targets=targets)
        out = Served(*(memory[:count] for memory in self._served))
        if self._kernel is not None:
            self._kernel(self._encoded(context.float()), targets, out)
        else:
            self._in_plain_torch(context.float(), targets, out)
        return out

    def capture(self, batch: int) -> Captured:
        """`run` for ``batch`` rows as a CUDA graph; on other devices, and in plain torch, an ordinary call.

        All captures of a head write into the same memory. A plain budget asks the device for its answer as it goes,
        which no graph can hold.
        """
        context = self.levels.new_zeros(batch, self.params.context_width)
        if not (self.fused and self.levels.is_cuda):

            def again() -> None:
                self.run(context)

            return Captured(context, self.run(context), again)
        with torch.cuda.device(self.levels.device):
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # the libraries behind the GEMMs allocate on their first call
                self.run(context)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                served = self.run(context)
        return Captured(context, served, graph.replay)

    def _encoded(self, context: Tensor) -> Tensor:
        """What the kernel begins with: the input of the affine head, or raw rows where it does not hold that head."""
        params = self.params
        if not _holds_head(params):
            return reference.context_stage(params, context)
        for i, (weight, bias) in enumerate(params.encoder):
            context = F.linear(context, weight, bias)
            if i + 1 < len(params.encoder) or params.encoder_output_activation:
                context = reference.context_activation(context, params.encoder_activation)
        return context

    def _in_plain_torch(self, context: Tensor, targets: Tensor | None, out: Served) -> None:
        rows = reference.context_stage(self.params, context)
        levels = self.levels.expand(len(rows), -1)
        _, mapped = reference.picnn_levels(
            rows, levels, self.params.wz, options=self.params.options, tolerance=0.0, precision="float32"
        )
        linked = torch.sigmoid(mapped) if self.link == "sigmoid" else mapped
        out.quantiles.copy_(linked.clamp(0.0, 1.0).cummax(1).values)
        out.expected.copy_(out.quantiles.double() @ self.quadrature)
        budget = ias.ias_budget(out.quantiles, self.target if targets is None else targets, self.n_max)
        out.budget.copy_(torch.where(out.quantiles.isnan().any(1), 0, budget))


def _trapezoid(levels: Sequence[float]) -> Tensor:
    """Weights [M] float64 whose sum with values at ``levels`` is the integral by trapezoids."""
    gaps = torch.tensor(levels, dtype=torch.float64).diff() / 2
    return F.pad(gaps, (0, 1)) + F.pad(gaps, (1, 0))


def _copied(params: PicnnParams) -> PicnnParams:
    """The network in float32, contiguous, with weights of its own."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def pairs(linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
        return tuple((copy(weight), copy(bias)) for weight, bias in linears)

    return replace(
        params,
        wz=tuple(copy(w) for w in params.wz),
        heads=pairs(params.heads),
        transitions=pairs(params.transitions),
        encoder=pairs(params.encoder),
    )


def _holds_head(params: PicnnParams) -> bool:
    """The kernel multiplies by the affine head itself."""
    return not params.transitions and params.heads[0][0].shape[1] <= CUDA_HEAD_INPUTS


class _Kernel:
    """The launch with every argument that stays the same, and the tensors that these point into."""

    def __init__(self, head: ServingHead, split: bool) -> None:
        picnn = importlib.import_module("prmfast.ops._cuda.picnn")  # which needs a GPU; ops imports this module
        self.stream_of, self.serve = picnn.stream_of, picnn.KERNELS.serve
        params, device = head.params, head.levels.device
        network = picnn.network_of(params.widths, params.options)
        fragments = torch.empty(network.fragment_bytes(split), dtype=torch.uint8, device=device)
        self.target = torch.full((1,), head.target, dtype=torch.float64, device=device)
        self.held = [*params.wz, fragments, head.levels, head.quadrature]
        inputs, pointers = 0, (0, 0)
        if _holds_head(params):
            weight, bias = params.heads[0][0].t().contiguous(), params.heads[0][1]
            inputs, pointers = len(weight), (weight.data_ptr(), bias.data_ptr())
            self.held += [weight, bias]
        self.fixed: dict[str, Any] = {
            "network": network,
            "wz": [w.data_ptr() for w in params.wz],
            "fragments": fragments.data_ptr(),
            "split": split,
        }
        with self.stream_of(fragments) as stream:
            picnn.KERNELS.prepare(**self.fixed, stream=stream)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # whichever stream serves finds them there
        self.fixed |= {
            "weight": pointers[0],
            "bias": pointers[1],
            "inputs": inputs,
            "levels": head.levels.data_ptr(),
            "quadrature": head.quadrature.data_ptr(),
            "m": len(head.levels),
            "n_max": head.n_max,
            "sigmoid": head.link == "sigmoid",
        }

    def __call__(self, rows: Tensor, targets: Tensor | None, out: Served) -> None:
        rows, target = contiguous_columns(rows), self.target if targets is None else targets
        with self.stream_of(rows) as stream:
            self.serve(
                **self.fixed,
                input=rows.data_ptr(),
                input_stride=rows.stride(0),
                target=target.data_ptr(),
                target_stride=0 if targets is None else targets.stride(0),
                count=len(rows),
                quantiles=out.quantiles.data_ptr(),
                expected=out.expected.data_ptr(),
                budget=out.budget.data_ptr(),
                stream=stream,
            )
