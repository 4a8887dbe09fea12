"""How rivals are handed tensors and run: jax arrays that share memory, ``jax.jit``, ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prmfast.bench.case import Call, require


def to_jax(tree: Any) -> Any:
    """Tensors of nested tuples as jax arrays that share their memory."""
    jax = require("jax")
    if isinstance(tree, Tensor):
        return jax.dlpack.from_dlpack(tree.detach().contiguous())
    return tuple(to_jax(item) for item in tree)


def to_torch(value: Any) -> Tensor:
    """A jax or numpy array as a tensor."""
    import numpy as np

    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def jitted(function: Callable[..., Any], *arguments: Any) -> Call:
    """``jax.jit(function)`` on arrays that are already jax's; a call ends when its result is there."""
    jax = require("jax")
    compiled = jax.jit(function)
    return Call(lambda: jax.block_until_ready(compiled(*arguments)))


def compiled(function: Callable[..., Any], *arguments: Any, grad: bool = False) -> Call:
    """``torch.compile`` with static shapes."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            return fast(*arguments)

    return Call(run)
