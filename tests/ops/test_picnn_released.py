"""The released recursion [C] and its losses against the condot vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prmfast.calibration.objectives import dual_conjugate_loss, dual_map_loss
from prmfast.kernels.picnn.released import negative_weight_penalty, params_from_released, potential, transport
from tests.ops.device import backends, picnn_map
from tests.vectors import Vectors, assert_relative

PICNN_CASES = ["d1_c4_h8x3", "d3_c5_h8x2", "d1_c4_default_init", "d1_c4_relu", "d1_c4_u_8_12_12"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SUFFIX = {torch.float64: "f64", torch.float32: "f32"}


def network(tensors: dict[str, Tensor], name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v.to(dtype).requires_grad_() for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def picnn_vectors(shared_vectors: Path) -> Vectors:
    return Vectors(shared_vectors / "condot_picnn.npz")


def test_every_case_is_named(picnn_vectors: Vectors) -> None:
    assert [case["case"] for case in picnn_vectors.cases] == PICNN_CASES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PICNN_CASES)
def test_forward_map_and_losses(picnn_vectors: Vectors, name: str, dtype: torch.dtype) -> None:
    case = next(c for c in picnn_vectors.cases if c["case"] == name)
    given, expected, suffix = picnn_vectors.inputs(case), picnn_vectors.outputs(case), SUFFIX[dtype]
    options = {"activation": case["params"].get("activation", "leaky_relu")}
    x, y, context = (given[k].to(dtype) for k in ("x", "y", "ctx"))
    f, g = network(given, "f", dtype), network(given, "g", dtype)
    mapped = transport(g, context, x, **options)
    assert_relative(mapped.detach(), expected[f"T_{suffix}"], TOLERANCE[dtype])
    assert_relative(potential(g, context, x, **options).detach(), expected[f"g_x_{suffix}"], TOLERANCE[dtype])
    assert_relative(potential(f, context, y, **options).detach(), expected[f"f_y_{suffix}"], TOLERANCE[dtype])
    at_map = potential(f, context, mapped, **options)
    loss_g = at_map - (x * mapped).sum(1, keepdim=True)
    assert_relative(loss_g.detach(), expected[f"loss_g_{suffix}"], TOLERANCE[dtype])
    loss_f = potential(f, context, y, **options) - at_map
    assert_relative(loss_f.detach(), expected[f"loss_f_{suffix}"], TOLERANCE[dtype])


@pytest.mark.parametrize("name", PICNN_CASES)
def test_parameter_gradients(picnn_vectors: Vectors, name: str) -> None:
    case = next(c for c in picnn_vectors.cases if c["case"] == name)
    given, expected = picnn_vectors.inputs(case), picnn_vectors.outputs(case)
    options = {"activation": case["params"].get("activation", "leaky_relu")}
    f, g = network(given, "f"), network(given, "g")
    mapped = transport(g, given["ctx"], given["x"], **options)
    loss_g = (potential(f, given["ctx"], mapped, **options) - (given["x"] * mapped).sum(1, keepdim=True)).mean()
    penalty = negative_weight_penalty(g)
    assert_relative(penalty.detach(), expected["penalty_f64"], 1e-9)
    assert_relative((loss_g + penalty).detach(), expected["loss_g_total_f64"], 1e-9)
    check_gradients(loss_g + penalty, g, expected, "dg")
    mapped = mapped.detach()
    loss_f = (potential(f, given["ctx"], given["y"], **options) - potential(f, given["ctx"], mapped, **options)).mean()
    check_gradients(loss_f, f, expected, "df")


def check_gradients(loss: Tensor, weights: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for (key, weight), gradient in zip(weights.items(), found, strict=True):
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        assert_relative(gradient, expected[f"{prefix}.{key}"], 1e-9)


@pytest.mark.parametrize("backend", backends("picnn"))
@pytest.mark.parametrize("name", [name for name in PICNN_CASES if name.startswith("d1")])
def test_the_op_runs_released_checkpoints(picnn_vectors: Vectors, name: str, backend: str) -> None:
    case = next(c for c in picnn_vectors.cases if c["case"] == name)
    given, expected = picnn_vectors.inputs(case), picnn_vectors.outputs(case)
    activation = case["params"].get("activation", "leaky_relu")
    for dtype in (torch.float64, torch.float32):
        params = params_from_released(network(given, "g", dtype), activation=activation)
        value, gradient = picnn_map(params, given["ctx"].to(dtype), given["x"].to(dtype), backend=backend)
        assert_relative(value.detach(), expected[f"g_x_{SUFFIX[dtype]}"], TOLERANCE[dtype])
        assert_relative(gradient.detach(), expected[f"T_{SUFFIX[dtype]}"], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", backends("picnn"))
def test_distributional_prm_variant(shared_vectors: Path, backend: str) -> None:
    vectors = Vectors(shared_vectors / "condot_dprm.npz")
    for case in vectors.cases:
        given, expected = vectors.inputs(case), vectors.outputs(case)
        weights, params = {}, {}
        for name in ("f", "g"):
            weights[name] = network(given, name)
            phi = tuple((weights[name][f"phi.{i}.weight"], weights[name][f"phi.{i}.bias"]) for i in (0, 2))
            state = {k.removeprefix("net."): v for k, v in weights[name].items() if k.startswith("net.")}
            params[name] = params_from_released(state, encoder=phi)
        hidden, levels = given["h"], given["x"]
        _, mapped = picnn_map(params["g"], hidden, levels, backend=backend)
        assert_relative(mapped.detach(), expected["T"], 1e-9)
        for count in (11, 101):
            grid = torch.linspace(0, 1, count, dtype=torch.float64)
            assert_relative(
                picnn_map(params["g"], hidden, grid, backend=backend)[1].detach(), expected[f"Q{count}"], 1e-9
            )
        at_map, _ = picnn_map(params["f"], hidden, mapped, backend=backend)
        loss_g = dual_map_loss(at_map, mapped, levels)
        assert_relative(loss_g.detach(), expected["loss_g"], 1e-9)
        check_gradients(loss_g, weights["g"], expected, "dg")
        at_target, _ = picnn_map(params["f"], hidden, given["y"], backend=backend)
        at_map, _ = picnn_map(params["f"], hidden, mapped.detach(), backend=backend)
        loss_f = dual_conjugate_loss(at_target, at_map)
        assert_relative(loss_f.detach(), expected["loss_f"], 1e-9)
        check_gradients(loss_f, weights["f"], expected, "df")


def test_conversion_errors() -> None:
    with pytest.raises(ValueError, match=r"state must hold w\.0\.weight"):
        params_from_released({"a": torch.zeros(1)})
    wide = {"w.0.weight": torch.zeros(2, 2), "wxu.0.weight": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="scalar input only, got input width 3"):
        params_from_released(wide)
