"""The ops as the tests call them: every backend that runs here, on the device it runs on.

Tests make CPU tensors. A backend of a GPU gets copies there and its answers come back, differentiably, so that one test
holds every backend to the same truth. Without a GPU the Triton backend runs in its interpreter, on CPU tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prmfast import ops
from prmfast.ops._backends import explain

GPU = torch.cuda.is_available()
GPU_BACKENDS = ("triton", "cuda")


def backends(room: str, *, interpreted: bool = True) -> tuple[str, ...]:
    """Every backend of ``room`` that runs on this machine, the reference first.

    interpreted: with Triton in its interpreter too, which takes a millisecond for an operation of a program.
    """
    here = tuple(b for b in ops.available(room, "cpu") if interpreted or b != "triton")
    return here + tuple(b for b in ops.available(room, "cuda") if GPU and b not in here)


def interpreted(backend: str) -> bool:
    """A program of a kernel takes some 50 ms there: such a backend gets fewer and smaller cases."""
    return backend == "triton" and not GPU


def device_of(backend: str) -> str:
    """Where ``backend`` wants its tensors."""
    return "cuda" if GPU and backend in GPU_BACKENDS else "cpu"


def taking(room: str, backend: str, **facts: Any) -> str:
    """``backend``, or auto where it does not take a call of these ``facts``."""
    refused = device_of(backend) == "cuda" and explain(room, "cuda", **facts)[backend] is not None
    return "auto" if refused else backend


def moved(value: Any, device: str) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def moved_values(values: dict[str, Any], device: str) -> dict[str, Any]:
    """`moved` for keyword arguments."""
    return {name: moved(value, device) for name, value in values.items()}


def answered(op: Callable[..., Any], *args: Any, backend: str, **kwargs: Any) -> Any:
    """``op`` of ``backend``, or of what auto takes where that says that it does not take such a call."""
    try:
        return op(*args, backend=backend, **kwargs)
    except ValueError as error:
        if "does not take this call" not in str(error):
            raise
    return op(*args, backend="auto", **kwargs)


def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` for CPU tensors, whatever device its ``backend`` runs on."""

    @functools.wraps(op)
    def call(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        if not (GPU and backend in GPU_BACKENDS):
            return op(*args, backend=backend, **kwargs)
        args, kwargs = moved(args, "cuda"), moved_values(kwargs, "cuda")
        return moved(answered(op, *args, backend=backend, **kwargs), "cpu")

    return call


class _There:
    """CPU tensors on a GPU with their strides, and two of one memory in one memory: `Tensor.to` keeps neither."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return moved(value, "cuda")
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.held:
            self.held[storage.data_ptr()] = storage, storage.cuda()
        there = torch.empty(0, dtype=value.dtype, device="cuda")
        return there.set_(self.held[storage.data_ptr()][1], value.storage_offset(), value.shape, value.stride())

    def bring_back(self) -> None:
        for storage, there in self.held.values():
            storage.copy_(there)


def on_device_into(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`on_device` for an op that writes into ``out``, which may be its first argument, or share memory with it."""

    @functools.wraps(op)
    def call(first: Any, *args: Any, out: Any = None, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not (GPU and backend in GPU_BACKENDS):
            return op(first, *args, out=out, backend=backend, **kwargs)
        there = _There()
        source = there.of(first)
        target = source if out is first else there.of(out)
        args, kwargs = moved(args, "cuda"), moved_values(kwargs, "cuda")
        loss, written = answered(op, source, *args, out=target, backend=backend, **kwargs)
        if out is None:
            return loss.cpu(), written.cpu()
        there.bring_back()
        return loss.cpu(), out

    return call


def picnn_step(*args: Any, backend: str = "auto", **kwargs: Any) -> ops.PicnnStep:
    """`on_device` for `prmfast.ops.picnn_step`, whose answer holds a function."""
    if not (GPU and backend in GPU_BACKENDS):
        return ops.picnn_step(*args, backend=backend, **kwargs)
    step = answered(ops.picnn_step, *moved(args, "cuda"), backend=backend, **moved_values(kwargs, "cuda"))

    def pull_back(by_value: Tensor, by_gradient: Tensor, context_gradient: bool) -> Any:
        return moved(step.pull_back(by_value.to("cuda"), by_gradient.to("cuda"), context_gradient), "cpu")

    return ops.PicnnStep(step.value.cpu(), step.gradient.cpu(), pull_back)


candidate_td = on_device(ops.candidate_td)
dist_ppo_loss = on_device(ops.dist_ppo_loss)
dist_ppo_loss_and_grad = on_device_into(ops.dist_ppo_loss_and_grad)
ias_allocate = on_device(ops.ias_allocate)
ias_budget = on_device(ops.ias_budget)
ias_curve = on_device(ops.ias_curve)
linear_candidate_td = on_device(ops.linear_candidate_td)
linear_dist_ppo_loss = on_device(ops.linear_dist_ppo_loss)
picnn_map = on_device(ops.picnn_map)
token_logprob = on_device(ops.token_logprob)
