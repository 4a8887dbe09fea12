"""The layer recursion of the released conditional Monge maps code [C], under its own parameter names.

`potential` follows it for an input of any width; `params_from_released` turns a checkpoint of a scalar input into
`PicnnParams`, differentiably, so that every backend runs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.kernels.picnn.params import Linear, PicnnParams
from prmfast.kernels.picnn.reference import activate, softplus


def hidden_layers(state: Mapping[str, Tensor]) -> int:
    """L: the number of ``w.i`` layers of a released state dict."""
    count = sum(1 for name in state if name.startswith("w.") and name.endswith(".weight"))
    if count == 0:
        raise ValueError(f"state must hold w.0.weight, wz.0.weight, ... of a PICNN, got names {sorted(state)[:5]}")
    return count


def potential(
    state: Mapping[str, Tensor],
    context: Tensor,
    x: Tensor,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """g(x, context) for x [B, d] and context [B, c] -> [B, 1], exactly the released recursion."""

    def s(t: Tensor) -> Tensor:
        return activate(t, activation, negative_slope)[0]

    def linear(name: str, t: Tensor) -> Tensor:
        return F.linear(t, state[f"{name}.weight"], state.get(f"{name}.bias"))

    layers, u = hidden_layers(state), context
    z = x.new_zeros(len(x), 0)
    for i in range(layers):
        u = s(linear(f"w.{i}", u))
        p = linear(f"wx.{i}", x * linear(f"wxu.{i}", u)) + linear(f"wu.{i}", u)
        z = s(p) ** 2 if i == 0 else s(linear(f"wz.{i - 1}", z * softplus(linear(f"wzu.{i - 1}", u))) + p)
    last = linear(f"wz.{layers - 1}", z * softplus(linear(f"wzu.{layers - 1}", u)))
    return last + linear(f"wx.{layers}", x * linear(f"wxu.{layers}", u)) + linear(f"wu.{layers}", u)


def transport(
    state: Mapping[str, Tensor],
    context: Tensor,
    x: Tensor,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """T(x) = dg/dx [B, d] by autograd, itself differentiable."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        g = potential(state, context, x, activation=activation, negative_slope=negative_slope)
        (gradient,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    return gradient


def negative_weight_penalty(state: Mapping[str, Tensor]) -> Tensor:
    """sum_i ||relu(-wz_i)||: what the released code adds to the loss of g instead of a hard constraint."""
    weights = [tensor for name, tensor in state.items() if name.startswith("wz.")]
    return torch.stack([torch.linalg.norm(torch.relu(-weight)) for weight in weights]).sum()


def params_from_released(
    state: Mapping[str, Tensor],
    *,
    encoder: tuple[Linear, ...] = (),
    encoder_activation: str = "relu",
    encoder_output_activation: bool = False,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> PicnnParams:
    """A released state dict (names ``w.i, wz.i, wzu.i, wx.i, wxu.i, wu.i``) of a scalar input as `PicnnParams`.

    Gradients flow back to the tensors of ``state``. ``encoder`` is phi, the released network has none. Raises
    ValueError where the input is wider than one.
    """
    layers = hidden_layers(state)
    if state["wxu.0.weight"].shape[0] != 1:
        raise ValueError(
            f"released checkpoints convert for a scalar input only, got input width {state['wxu.0.weight'].shape[0]}"
        )

    def affine(i: int) -> list[Linear]:
        """[v_i, c_i]: p = wx (x (wxu u + b)) + wx_b + wu u."""
        wx, wxu, wxu_bias = state[f"wx.{i}.weight"], state[f"wxu.{i}.weight"], state[f"wxu.{i}.bias"]
        return [(wx @ wxu, wx @ wxu_bias), (state[f"wu.{i}.weight"], state[f"wx.{i}.bias"])]

    def gate(i: int) -> Linear:
        return state[f"wzu.{i - 1}.weight"], state[f"wzu.{i - 1}.bias"]

    heads = []
    for i in range(layers):
        last = i + 1 == layers
        rows = (
            affine(i) + (affine(layers) if last else []) + ([gate(i)] if i else []) + ([gate(layers)] if last else [])
        )
        heads.append((torch.cat([w for w, _ in rows]), torch.cat([b for _, b in rows])))
    return PicnnParams(
        wz=tuple(state[f"wz.{i}.weight"] for i in range(layers)),
        heads=tuple(heads),
        transitions=tuple((state[f"w.{i}.weight"], state[f"w.{i}.bias"]) for i in range(layers)),
        encoder=encoder,
        activation=activation,
        negative_slope=negative_slope,
        square_first=True,
        encoder_activation=encoder_activation,
        encoder_output_activation=encoder_output_activation,
    )
