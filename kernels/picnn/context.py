"""The context stage and its backward pass where no autograd is wanted: what the compiled backends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from prmfast.kernels.picnn.reference import context_activation


class Product(Protocol):
    """a [m, k] @ b [n, k].T + bias [n]."""

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [m, n]."""


def torch_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`Product` by torch."""
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def picnn_context(
    context: Tensor,
    linears: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    activations: Sequence[str],
    product: Product = torch_product,
) -> tuple[Tensor, list[Tensor]]:
    """Raw rows [B, P], and what each layer of the encoder makes before its activation.

    linears: weight and bias of every layer, the head last. activations: one a layer of the encoder, "none" for none.
    """
    u, before = context, []
    for i, name in enumerate(activations):
        before.append(product(u, linears[2 * i], linears[2 * i + 1]))
        u = _layer_output(before[i], name, scales[i] if scales else None)
    return product(u, linears[-2], linears[-1]), before


def picnn_context_backward(
    d_rows: Tensor,
    context: Tensor,
    linears: Sequence[Tensor],
    scales: Sequence[Tensor],
    before: Sequence[Tensor],
    *,
    activations: Sequence[str],
    context_gradient: bool,
    product: Product = torch_product,
) -> tuple[Tensor, list[Tensor]]:
    """d context (empty unless wanted) and d linears."""
    d_linears: list[Tensor] = []
    d_out = d_rows
    for i in range(len(activations), -1, -1):  # the layer that made d_out; the head is the last
        scale = scales[i - 1] if scales and i else None
        u = _layer_output(before[i - 1], activations[i - 1], scale) if i else context
        d_linears[:0] = [product(d_out.t(), u.t()), d_out.sum(0)]
        if i == 0:
            break
        d_u = product(d_out, linears[2 * i].t())
        d_out = _activation_backward(d_u if scale is None else d_u * scale, before[i - 1], activations[i - 1])
    d_context = product(d_out, linears[0].t()) if context_gradient else context.new_empty(0)
    return d_context, d_linears


def _layer_output(before: Tensor, name: str, scale: Tensor | None) -> Tensor:
    u = before if name == "none" else context_activation(before, name)
    return u if scale is None else u * scale


def _activation_backward(grad: Tensor, before: Tensor, name: str) -> Tensor:
    if name == "silu":
        out: Tensor = torch.ops.aten.silu_backward(grad, before)
        return out
    if name == "relu":
        return grad * (before > 0)
    return grad * (1 - torch.tanh(before).square()) if name == "tanh" else grad
