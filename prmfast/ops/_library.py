"""The one torch.library of the project. Ops are defined with define + impl: a call costs a quarter of custom_op's."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY = torch.library.Library("prmfast", "DEF")


def once_differentiable(op: str, backward: str) -> None:
    """A derivative through the op ``backward`` says that ``op`` has only a first one, instead of being none at all."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op} is differentiable once, got a second derivative; use the formula on plain tensors"
        )

    torch.library.register_autograd(f"prmfast::{backward}", refuse, lib=LIBRARY)
