"""The one torch.library of the project. Ops are defined with define + impl: a call costs a quarter of custom_op's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from prmfast._ranges import nvtx

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("prmfast", "DEF")


def once_differentiable(op: str, backward: str) -> None:
    """A derivative through the op ``backward`` says that ``op`` has only a first one, instead of being none at all."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op} is differentiable once, got a second derivative; use the formula on plain tensors"
        )

    torch.library.register_autograd(f"prmfast::{backward}", refuse, lib=LIBRARY)


def implement(op: str, function: Function) -> Function:
    """``function`` as the op's one implementation for every device, in the NVTX range ``prmfast::<op>`` on a GPU.

    Returns what stands behind the op, for callers that need no dispatcher.
    """

    @functools.wraps(function)
    def ranged(*args: Any) -> Any:
        if not torch.cuda.is_initialized():
            return function(*args)
        with nvtx(f"prmfast::{op}"):
            return function(*args)

    LIBRARY.impl(op, ranged, "CompositeExplicitAutograd")
    return ranged  # type: ignore[return-value]
