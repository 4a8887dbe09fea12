"""The compiled backends' own arithmetic: float32 against the float64 truth, order, and what a row may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops import picnn_map
from prmfast.ops._backends import explain
from prmfast.ops.picnn import context_stage
from prmfast.testing import make_picnn, poison
from tests.ops.device import backends, device_of, moved

COMPILED = backends("picnn")[1:]
NETWORKS = {
    "softplus": {"activation": "softplus", "curvature": True, "curvature_floor": 1e-3},
    "leaky": {"activation": "leaky_relu", "square_first": True},
    "relu-gate": {"activation": "softplus", "gate": "relu"},
    "relu": {"activation": "relu", "curvature": True},
}
WIDTHS = {"one": (1,), "odd": (7, 9, 6), "calibrator": (32, 32), "wide": (64, 64, 64, 64), "deep": (16, 16, 16, 16)}
TOLERANCE = 1e-5  # of the largest number of the result


def inputs(rows: int, levels: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.rand(rows, levels, generator=generator)


def everything(params: PicnnParams, context: Tensor, levels: Tensor, backend: str) -> list[Tensor]:
    """Value, gradient, and the gradients of a loss on both to the context, the levels and every weight; on the CPU."""
    params, context, levels = moved((params, context, levels), device_of(backend))
    context, levels = context.clone().requires_grad_(), levels.clone().requires_grad_()
    wz = tuple(w.clone().requires_grad_() for w in params.wz)
    head = tuple(t.clone().requires_grad_() for t in params.heads[0])
    params = replace(params, wz=wz, heads=(head,))
    value, gradient = picnn_map(params, context, levels, tolerance=0.0, backend=backend)
    generator = torch.Generator().manual_seed(3)
    by_value, by_gradient = (torch.randn(value.shape, generator=generator).to(value) for _ in range(2))
    grads = torch.autograd.grad((value * by_value + gradient * by_gradient).sum(), [context, levels, *wz, *head])
    return [t.detach().cpu() for t in (value, gradient, *grads)]


def check_everything(params: PicnnParams, context: Tensor, levels: Tensor, backend: str) -> None:
    truth = everything(params.to(dtype=torch.float64), context.double(), levels.double(), "reference")
    with poison():
        found = everything(params, context, levels, backend)
    for i, (ours, exact) in enumerate(zip(found, truth, strict=True)):
        error, scale = float((ours.double() - exact).abs().max()), float(exact.abs().max())
        assert error <= TOLERANCE * scale, f"result {i}: error {error:.2e}, scale {scale:.2e}"


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_float32_against_float64(backend: str, network: str, widths: tuple[int, ...]) -> None:
    params = make_picnn(5, widths, dtype=torch.float32, **NETWORKS[network])
    check_everything(params, *inputs(3, 11), backend)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("levels", [1, 2, 3, 8, 16, 17, 33, 65, 129])
def test_any_number_of_levels(backend: str, levels: int) -> None:
    params = make_picnn(5, (9, 6), dtype=torch.float32, **NETWORKS["softplus"])
    check_everything(params, *inputs(3 if levels < 33 else 2, levels), backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_layers_of_128_units(backend: str) -> None:
    params = make_picnn(5, (100, 128), dtype=torch.float32, **NETWORKS["softplus"])
    if explain("picnn", "cuda", widths=params.widths[:-1]).get(backend):
        pytest.skip(f"{backend} leaves such layers to another backend")
    check_everything(params, *inputs(2, 17), backend)


def levels_ops(params: PicnnParams, backend: str) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    """Both passes of the levels stage by themselves, on CPU tensors."""
    rest = (*params.options, 0.0, "float32", backend)

    def forward(rows: Tensor, levels: Tensor) -> list[Tensor]:
        given = moved((rows, levels, list(params.wz), *rest), device_of(backend))
        return [t.cpu() for t in torch.ops.prmfast.picnn_levels(*given)]

    def backward(by_value: Tensor, by_gradient: Tensor, rows: Tensor, levels: Tensor) -> list[Tensor]:
        wz = list(params.wz)
        given = moved((by_value, by_gradient, rows, levels, wz, *params.options, backend), device_of(backend))
        d_rows, d_levels, d_wz = torch.ops.prmfast.picnn_levels_backward(*given)
        return [t.cpu() for t in (d_rows, d_levels, *d_wz)]

    return forward, backward


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("levels", [1, 11, 40])
def test_a_row_does_not_depend_on_the_batch(backend: str, levels: int) -> None:
    params = make_picnn(5, (9, 16), dtype=torch.float32, **NETWORKS["softplus"])
    context, points = inputs(5, levels)
    rows, (by_value, by_gradient) = context_stage(params, context), inputs(5, levels, seed=7)[1:] * 2
    forward, backward = levels_ops(params, backend)
    together = [*forward(rows, points), *backward(by_value, by_gradient, rows, points)[:2]]
    for row in (0, 3):
        own = slice(row, row + 1)
        alone = [*forward(rows[own], points[own])]
        alone += backward(by_value[own], by_gradient[own], rows[own], points[own])[:2]
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[row])


@pytest.mark.parametrize("backend", COMPILED)
def test_strided_and_expanded_levels(backend: str) -> None:
    params = make_picnn(5, (9, 6), dtype=torch.float32, **NETWORKS["softplus"])
    context, points = inputs(4, 13)
    rows = context_stage(params, context)
    forward, backward = levels_ops(params, backend)
    for strided in (points.t().contiguous().t(), points[:1].expand(4, -1), points[:, :1].expand(-1, 13)):
        plain = strided.contiguous()
        for a, b in zip(forward(rows, strided), forward(rows, plain), strict=True):
            assert torch.equal(a, b)
        expanded = torch.ones(()).expand(4, 13)
        own, other = (backward(expanded, grad, rows, x) for grad, x in ((expanded, strided), (expanded.clone(), plain)))
        for a, b in zip(own, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("count", [2, 20, 100])
def test_the_gradient_never_falls(backend: str, count: int) -> None:
    params = make_picnn(5, (16, 16), dtype=torch.float32, gate="relu")
    context, points = inputs(3, count)
    points = (20 * points).round() / 20 + 1e-6 * torch.rand(points.shape, generator=torch.Generator().manual_seed(2))
    rows = context_stage(params, context)
    forward, _ = levels_ops(params, backend)
    gradient = forward(rows, points)[1]
    assert bool((gradient.gather(1, points.argsort(1)).diff(dim=1) >= 0).all())
    concave = replace(params, wz=tuple(-w for w in params.wz))
    falling = levels_ops(concave, backend)[0](rows, points)[1]
    truth = levels_ops(concave.to(dtype=torch.float64), "reference")[0](rows.double(), points.double())[1]
    torch.testing.assert_close(falling.double(), truth, rtol=1e-4, atol=1e-5)
    assert bool((falling.gather(1, points.argsort(1)).diff(dim=1) < 0).any())


@pytest.mark.parametrize("backend", [b for b in COMPILED if b == "triton"])
class TestTriton:
    def test_the_running_maximum(self, backend: str) -> None:
        from prmfast.kernels.picnn import triton_impl

        generator = torch.Generator().manual_seed(1)
        for m in (2, 17, 64, 150):
            levels, raw = torch.rand(2, m, generator=generator), torch.randn(2, m, generator=generator)
            order = levels.argsort(1)
            expected = torch.empty_like(raw).scatter_(1, order, raw.gather(1, order).cummax(1).values)
            for flags, out in (([1, 1, 1], expected), ([1, 0, 1], raw)):
                given = moved([levels, raw, torch.tensor(flags, dtype=torch.int32)], device_of(backend))
                gradient = torch.full_like(given[1], torch.nan)
                triton_impl._keep_order(*given, gradient)
                assert torch.equal(gradient.cpu(), out)

    def test_what_is_no_number_stays_one_entry(self, backend: str) -> None:
        from prmfast.kernels.picnn import triton_impl

        raw = torch.tensor([[0.5, torch.nan, 0.25, 1.0]])
        given = moved([torch.arange(4.0).unsqueeze(0), raw, torch.ones(1, dtype=torch.int32)], device_of(backend))
        gradient = torch.empty_like(given[1])
        triton_impl._keep_order(*given, gradient)
        torch.testing.assert_close(
            gradient.cpu(), torch.tensor([[0.5, torch.nan, 0.5, 1.0]]), equal_nan=True, rtol=0, atol=0
        )

    def test_contexts_take_turns_on_a_small_tape(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from prmfast.kernels.picnn import tuning

        params = make_picnn(5, (9, 6), dtype=torch.float32, **NETWORKS["softplus"])
        context, points = inputs(5, 3)
        _, backward = levels_ops(params, backend)
        given = (points, points, context_stage(params, context), points)
        whole = backward(*given)
        monkeypatch.setattr(tuning, "TAPE_BYTES", 16 * 2 * 16 * 3 * 2)
        assert tuning.contexts_of_a_tape(2 * 16, 3) == 2
        parts = backward(*given)
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])
        torch.testing.assert_close(whole[2:], parts[2:])

    def test_plain_bfloat16_is_an_option(self, backend: str) -> None:
        params = make_picnn(5, (32, 32), dtype=torch.float32, **NETWORKS["softplus"])
        context, points = moved(inputs(3, 11), device_of(backend))
        params = moved(params, device_of(backend))
        exact = picnn_map(params, context, points, backend=backend)[1]
        low = picnn_map(params, context, points, backend=backend, precision="bfloat16")[1]
        error = (low - exact).abs().amax(1) / exact.abs().mean(1)
        assert bool((error < 3e-2).all())
        assert bool((error > 1e-4).any())


def test_what_triton_takes() -> None:
    assert "hidden layers at most 128 wide, got (64, 129)" in str(
        explain("picnn", "cuda", dtype=torch.float32, widths=(64, 129))["triton"]
    )
