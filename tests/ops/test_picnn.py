from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast import ops
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops import resolve
from prmfast.ops._backends import load
from prmfast.ops.picnn import context_stage
from prmfast.testing import assert_within_budget, make_inputs, make_picnn, poison
from tests.ops.device import backends, device_of, moved, picnn_map, picnn_step

BACKENDS = backends("picnn")
WIDTHS = {"one": (1,), "narrow": (1, 1), "odd": (7, 9, 6), "calibrator": (32, 32), "deep": (16, 16, 16, 16)}
SHAPES = {"one": (1, 1), "row": (1, 11), "column": (5, 1), "odd": (3, 13), "tile+1": (2, 129)}
NETWORKS = {
    "softplus": {"activation": "softplus", "curvature": True, "curvature_floor": 1e-3},
    "leaky": {"activation": "leaky_relu", "square_first": True},
    "relu-gate": {"activation": "softplus", "gate": "relu"},
    "relu": {"activation": "relu", "curvature": True},
}


def inputs(rows: int, levels: int, width: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).double(), torch.rand(
        rows, levels, generator=generator
    ).double()


def naive(params: PicnnParams, context: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The line that the op replaces: g by the reference's value, dg/dx by autograd of it."""
    x = levels.clone().requires_grad_()
    value, _ = picnn_map(params, context, x, backend="reference")
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_autograd_of_the_value(
    backend: str, network: str, widths: tuple[int, ...], shape: tuple[int, int]
) -> None:
    params = make_picnn(5, widths, **NETWORKS[network])
    context, levels = inputs(*shape)
    truth = naive(params, context, levels)
    found = picnn_map(params, context, levels, backend=backend)
    for fast, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_within_budget(backend: str, dtype: torch.dtype) -> None:
    params = make_picnn(5, (32, 32), curvature=True).to(dtype=dtype)
    context, levels = (t.to(dtype) for t in inputs(9, 33))
    exact = params.to(dtype=torch.float64)
    truth = picnn_map(exact, context.double(), levels.double(), backend="reference")
    single = picnn_map(params.to(dtype=torch.float32), context.float(), levels.float(), backend="reference")
    found = picnn_map(params, context, levels, backend=backend)
    for fast, t, s in zip(found, truth, single, strict=True):
        assert fast.dtype == torch.float32
        assert_within_budget(fast, truth=t, same_dtype=s, slack=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", ["softplus", "leaky"])
def test_gradcheck_to_everything(backend: str, network: str) -> None:
    params = make_picnn(3, (4, 3), seed=3, **NETWORKS[network])
    context, levels = inputs(2, 3, width=3, seed=5)
    weights = [t.requires_grad_() for t in params.tensors()]

    def function(context: Tensor, levels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return picnn_map(params, context, levels, backend=backend)

    assert torch.autograd.gradcheck(function, (context.requires_grad_(), levels.requires_grad_(), *weights))


def with_encoder(dtype: torch.dtype = torch.float64, activation: str = "silu", **options: object) -> PicnnParams:
    """Context 6 -> 7 -> 5 -> rows of a (8, 8) network with curvature, every weight a leaf."""
    inner = make_picnn(5, (8, 8), seed=2, curvature=True, curvature_floor=1e-3)
    g = torch.Generator().manual_seed(8)
    shapes = ((7, 6), (7,), (5, 7), (5,))
    w0, b0, w1, b1 = (0.5 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    encoder = ((w0, b0), (w1, b1))
    return replace(inner, encoder=encoder, encoder_activation=activation, **options).to(dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
@pytest.mark.parametrize("output_activation", [True, False])
def test_gradcheck_through_the_encoder(backend: str, activation: str, output_activation: bool) -> None:
    params = with_encoder(activation=activation, encoder_output_activation=output_activation)
    context, levels = inputs(2, 3, width=6)
    scales = [torch.full((2, 7), 1.25).double(), torch.tensor([[0.0, 2, 2, 0, 2]] * 2).double()]
    weights = [t.requires_grad_() for t in params.tensors()]

    def function(context: Tensor, levels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return picnn_map(params, context, levels, encoder_scale=scales, backend=backend)

    assert torch.autograd.gradcheck(function, (context.requires_grad_(), levels.requires_grad_(), *weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_step_is_autograd_of_the_map(backend: str, rows: int) -> None:
    params = with_encoder()
    context, levels = inputs(rows, 3, width=6)
    scales = [torch.rand(rows, 7).double(), torch.rand(rows, 5).double()]
    weights = [t.requires_grad_() for t in params.tensors()]
    leaves = [context.clone().requires_grad_(), levels.clone().requires_grad_(), *weights]
    value, gradient = picnn_map(params, *leaves[:2], encoder_scale=scales, backend="reference")
    by_value, by_gradient = inputs(rows, 3, width=3, seed=4)
    step = picnn_step(params, context, levels, encoder_scale=scales, backend=backend)
    torch.testing.assert_close((step.value, step.gradient), (value.detach(), gradient.detach()))
    for grads in ((by_value, by_gradient), (by_value, None), (None, by_gradient)):
        kept = [(out, grad) for out, grad in zip((value, gradient), grads, strict=True) if grad is not None]
        loss = sum((out * grad).sum() for out, grad in kept)
        truth = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        found = step.backward(grad_value=grads[0], grad_gradient=grads[1], context_gradient=True)
        wz, linears = truth[2 : 2 + len(params.wz)], truth[2 + len(params.wz) :]
        assert found.context is not None
        ours = (found.context, found.levels, *found.wz, *found.linears)
        assert not any(t.requires_grad for t in ours)
        for a, b in zip(ours, (*truth[:2], *wz, *linears), strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert step.backward(grad_value=by_value).context is None
    assert not step.value.requires_grad


def test_a_second_derivative_says_no() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("the compiled extension is not built")
    params, (context, levels) = with_encoder(), inputs(2, 3, width=6)
    for own in (params, replace(params, encoder=(), transitions=params.encoder, heads=_two_heads())):
        x = levels.clone().requires_grad_()
        (first,) = torch.autograd.grad(picnn_map(own, context, x, backend="cpu")[0].sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="picnn_map is differentiable once"):
            first.sum().backward()


def _two_heads() -> tuple[tuple[Tensor, Tensor], ...]:
    """For transitions 6 -> 7 -> 5 and widths (8, 8): v_0 c_0, then v_1 c_1 v_2 c_2 gate_1 gate_2 kappa."""
    return tuple((torch.ones(size, u).double() / u, torch.zeros(size).double()) for size, u in ((16, 7), (35, 5)))


def test_step_says_what_is_wrong() -> None:
    params, (context, levels) = with_encoder(), inputs(2, 3, width=6)
    step = picnn_step(params, context, levels)
    with pytest.raises(ValueError, match=r"grad_value must be torch.float64 of shape \(2, 3\), got .*\(2, 2\)"):
        step.backward(grad_value=levels[:, :2])
    with pytest.raises(ValueError, match="picnn_step: params must have no transitions, got 1"):
        picnn_step(replace(params, transitions=params.encoder[-1:]), context, levels)
    with pytest.raises(ValueError, match="picnn_step: encoder_scale must have one tensor for each of 2 layers, got 1"):
        picnn_step(params, context, levels, encoder_scale=[levels])
    with pytest.raises(ValueError, match=r"encoder_scale\[0\] must have shape \(2, 7\), got \(2, 3\)"):
        picnn_map(params, context, levels, encoder_scale=[levels, levels])
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'int8'"):
        picnn_map(params, context, levels, precision="int8")
    with pytest.raises(ValueError, match="tolerance must be >= 0, got -1"):
        picnn_map(params, context, levels, tolerance=-1.0)


# --- interpolation, order and instruction sets: the compiled backend in float32


def steep(sharpness: float, rows: int, seed: int = 0) -> tuple[PicnnParams, Tensor]:
    """A (32, 32) float32 network whose first layer turns `sharpness` times faster, and contexts for it."""
    params = make_picnn(5, (32, 32), seed=seed, curvature=True, curvature_floor=1e-3)
    weight, bias = (t.clone() for t in params.heads[0])
    weight[:64] *= sharpness
    bias[:64] *= sharpness
    context = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).float()
    return replace(params, heads=((weight, bias),)).to(dtype=torch.float32), context


def gradient_error(params: PicnnParams, context: Tensor, levels: Tensor, **options: object) -> Tensor:
    """[B]: the largest error of a row's gradient over its mean magnitude."""
    exact = params.to(dtype=torch.float64)
    truth = picnn_map(exact, context.double(), levels.double(), backend="reference")[1]
    found = picnn_map(params, context, levels, **options)[1]  # type: ignore[arg-type]
    return (found.double() - truth).abs().amax(1) / truth.abs().mean(1)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not built")
class TestCompiled:
    @pytest.fixture(params=["amx", "amx_emulated", "avx512", "avx2", "portable"])
    def isa(self, request: pytest.FixtureRequest) -> Iterator[str]:
        from prmfast import _C

        before = _C.isa()
        try:
            _C.set_isa(request.param)
        except ValueError as error:
            pytest.skip(str(error))
        yield request.param
        _C.set_isa(before)

    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 100.0, 1000.0])
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_interpolation_keeps_its_tolerance(self, isa: str, sharpness: float, rows: int) -> None:
        params, context = steep(sharpness, rows)
        for levels in (torch.linspace(0.005, 0.995, 100), torch.rand(rows, 70), torch.linspace(0.3, 0.31, 64)):
            direct = gradient_error(params, context, levels, backend="cpu", tolerance=0.0)
            for tolerance in (1e-4, 1e-5):
                error = gradient_error(params, context, levels, backend="cpu", tolerance=tolerance)
                assert bool((error <= direct + 1e-6 + tolerance).all())

    def test_interpolation_happens(self, isa: str) -> None:
        smooth, context = steep(1.0, 40)
        sharp, _ = steep(1000.0, 40)
        levels = torch.linspace(0.005, 0.995, 100)
        for params, changed in ((smooth, True), (sharp, False)):
            direct = picnn_map(params, context, levels, backend="cpu", tolerance=0.0)[1]
            interpolated = picnn_map(params, context, levels, backend="cpu", tolerance=1e-4)[1]
            assert torch.equal(direct, interpolated) != changed

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        rows=st.integers(1, 36),
        count=st.integers(1, 130),
        sharpness=st.sampled_from([0.0, 0.01, 1.0, 30.0, 3000.0]),
        tolerance=st.sampled_from([0.0, 1e-6, 1e-5, 1e-2, 1.0]),
        shared=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_the_gradient_never_falls(
        self, isa: str, rows: int, count: int, sharpness: float, tolerance: float, shared: bool, seed: int
    ) -> None:
        params, context = steep(sharpness, rows, seed)
        g = torch.Generator().manual_seed(seed)
        levels = torch.rand(count, generator=g) if shared else torch.rand(rows, count, generator=g)
        if seed % 2:
            levels = (levels * 20).round() / 20 + 1e-6 * torch.rand(levels.shape, generator=g)  # close neighbours
        gradient = picnn_map(params, context, levels, tolerance=tolerance, backend="cpu")[1]
        order = levels.argsort(-1).expand(rows, -1)
        assert bool((gradient.gather(1, order).diff(dim=1) >= 0).all())

    def test_a_row_does_not_depend_on_its_neighbours(self, isa: str) -> None:
        smooth, context = steep(1.0, 45)
        sharp, _ = steep(1000.0, 45)
        weight, bias = smooth.heads[0]
        mixed = replace(smooth, heads=((torch.cat([weight, sharp.heads[0][0] - weight], 1), bias),))
        both = torch.cat([context, context * (torch.arange(45) % 3 == 0).unsqueeze(1)], 1)  # every third row is steep
        for levels in (torch.linspace(0.0, 1.0, 100), torch.rand(45, 100)):
            value, gradient = picnn_map(mixed, both, levels, backend="cpu", tolerance=1e-5)
            for row in range(45):
                own = levels if levels.ndim == 1 else levels[row : row + 1]
                # GEMMs of the context stage may round differently by their height: one row, sixteen times
                again = picnn_map(
                    mixed,
                    both[row : row + 1].expand(45, -1),
                    levels if levels.ndim == 1 else own.expand(45, -1),
                    backend="cpu",
                    tolerance=1e-5,
                )
                assert torch.equal(again[0][7], value[row])
                assert torch.equal(again[1][7], gradient[row])

    def test_no_order_is_forced_on_a_map_that_is_not_convex(self, isa: str) -> None:
        params = make_picnn(5, (8, 8), dtype=torch.float32)
        params = replace(params, wz=tuple(-w for w in params.wz))
        context, levels = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)), torch.linspace(0, 1, 50)
        assert bool((gradient_error(params, context, levels, backend="cpu") < 1e-4).all())
        assert bool((picnn_map(params, context, levels, backend="cpu")[1].diff(dim=1) < 0).any())

    def test_rows_in_lanes_and_levels_in_lanes_agree(self, isa: str) -> None:
        params, context = steep(3.0, 64)
        rows = context_stage(params, context)
        for levels in (torch.rand(64, 100), torch.linspace(0, 1, 100).expand(64, -1), torch.rand(64, 5)):
            arguments = (list(params.wz), *params.options, 1e-5, "float32", "cpu")
            many = torch.ops.prmfast.picnn_levels(rows, levels, *arguments)
            for row in (0, 17, 63):
                one = torch.ops.prmfast.picnn_levels(rows[row : row + 1], levels[row : row + 1], *arguments)
                assert torch.equal(one[0][0], many[0][row])
                assert torch.equal(one[1][0], many[1][row])

    def test_instruction_sets_agree(self, isa: str) -> None:
        params = make_picnn(5, (9, 17, 6), curvature=True)
        context, levels = inputs(21, 7)
        leaves = [context.requires_grad_(), levels.requires_grad_(), *(t.requires_grad_() for t in params.tensors())]
        results = []
        for backend in ("reference", "cpu"):
            value, gradient = picnn_map(params, context, levels, backend=backend)
            results.append((value, gradient, *torch.autograd.grad((value.sin() + gradient).sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_float32_is_float32(self, isa: str) -> None:
        for widths in ((32, 32), (40, 33, 17, 3), (64, 64, 64, 64)):
            params = make_picnn(5, widths, curvature=True, curvature_floor=1e-3, dtype=torch.float32)
            context, levels = (t.float() for t in inputs(20, 7))
            assert bool((gradient_error(params, context, levels, backend="cpu") < 3e-5).all())
            low = gradient_error(params, context, levels, backend="cpu", precision="bfloat16")
            assert bool((low < 3e-2).all())
            assert bool((low > 1e-4).any()) == isa.startswith("amx")  # an option, which only tiles make use of

    def test_wide_contexts(self, isa: str) -> None:
        """Products large enough for tiles, forward and backward, in every layout that they come in."""
        g = torch.Generator().manual_seed(6)
        for rows, width, hidden in ((130, 700, 65), (97, 513, 96)):
            inner = make_picnn(hidden, (16, 16), curvature=True, curvature_floor=1e-3)
            weight = torch.randn(hidden, width, generator=g, dtype=torch.float64) / width**0.5
            encoder = ((weight, torch.randn(hidden, generator=g, dtype=torch.float64)),)
            exact = replace(inner, encoder=encoder)
            params = exact.to(dtype=torch.float32)
            context, levels = torch.randn(rows, width, generator=g).float(), torch.rand(rows, 3, generator=g)
            grads = torch.randn(2, rows, 3, generator=g).unbind(0)
            truth = picnn_step(exact, context.double(), levels.double(), backend="reference")
            found = picnn_step(params, context, levels, backend="cpu")
            assert_within_budget(found.gradient, truth=truth.gradient, slack=2e-5)
            ours = found.backward(grad_value=grads[0], grad_gradient=grads[1], context_gradient=True)
            expected = truth.backward(
                grad_value=grads[0].double(), grad_gradient=grads[1].double(), context_gradient=True
            )
            assert ours.context is not None
            assert expected.context is not None
            pairs = [(ours.context, expected.context), *zip(ours.linears, expected.linears, strict=True)]
            for a, b in pairs:
                assert float((a.double() - b).abs().max()) <= 2e-5 * float(b.abs().max())

    def test_threads_change_nothing(self, isa: str) -> None:
        params, context = steep(1.0, 300)
        levels = torch.rand(300, 40)
        one = picnn_map(params, context, levels, backend="cpu")
        torch.set_num_threads(3)
        try:
            three = picnn_map(params, context, levels, backend="cpu")
            assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
        finally:
            torch.set_num_threads(1)


def test_an_unknown_instruction_set() -> None:
    _C = pytest.importorskip("prmfast._C")
    with pytest.raises(ValueError, match=r"isa must be one that this CPU has, at most .*, got sse9"):
        _C.set_isa("sse9")


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend: str) -> None:
    params = make_picnn(3, (4, 3))
    context, levels = inputs(2, 3, width=3)
    for expand in (False, True):
        points = levels[:1].expand(2, -1) if expand else levels
        rows = context_stage(params, context).requires_grad_()
        arguments = moved(
            (rows, points, list(params.wz), *params.options, 1e-5, "float32", backend), device_of(backend)
        )
        torch.library.opcheck(torch.ops.prmfast.picnn_levels.default, arguments)
    rows, wz = context_stage(params, context), list(params.wz)
    backward = (levels, levels, rows, levels, wz, *params.options, backend)
    torch.library.opcheck(torch.ops.prmfast.picnn_levels_backward.default, moved(backward, device_of(backend)))
    linears = [torch.randn(4, 3).double(), torch.randn(4).double(), torch.randn(*rows.shape[1:], 4).double(), rows[0]]
    scales, before = [torch.rand(2, 4).double()], [torch.randn(2, 4).double()]
    for context_gradient in (False, True):
        leaf = context.clone().requires_grad_(context_gradient)
        learnt = [t.detach().clone().requires_grad_() for t in linears]
        network = (leaf, levels, learnt, scales, wz, "silu", *params.options, 1e-5, "float32", backend)
        torch.library.opcheck(torch.ops.prmfast.picnn_network.default, moved(network, device_of(backend)))
        backward = (levels, levels, context, levels, linears, scales, wz, rows, before, "silu", context_gradient)
        opcheck_arguments = (*backward, *params.options, backend)
        torch.library.opcheck(
            torch.ops.prmfast.picnn_network_backward.default, moved(opcheck_arguments, device_of(backend))
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    given = make_inputs("picnn", 2, 3, dtype=torch.float32)

    def function(context: Tensor, levels: Tensor) -> Tensor:
        value, gradient = picnn_map(given["params"], context, levels, backend=backend)  # type: ignore[arg-type]
        return (value * gradient).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    points = given["context"], given["levels"]
    torch.testing.assert_close(compiled(*points), function(*points))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws_increasing_and_convex(backend: str) -> None:
    params = make_picnn(5, (32, 32), curvature=True, curvature_floor=1e-3, seed=11)
    context, _ = inputs(64, 1)
    levels = torch.linspace(-0.5, 1.5, 201).double()
    value, gradient = picnn_map(params, context, levels, backend=backend)
    assert bool((gradient.diff(dim=1) > 0).all())
    middle = value[:, 1:-1]
    assert bool((middle <= 0.5 * (value[:, :-2] + value[:, 2:]) + 1e-12).all())


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_rows_do_not_depend_on_the_batch(backend: str) -> None:
    params = make_picnn(5, (32, 32), dtype=torch.float32)
    context, levels = (t.float() for t in inputs(7, 20))
    coefficients = context_stage(params, context)

    def run(rows: slice) -> Tensor:
        arguments = (coefficients[rows], levels[rows], list(params.wz), *params.options, 1e-5, "float32", backend)
        return torch.ops.prmfast.picnn_levels(*moved(arguments, device_of(backend)))[1]

    assert torch.equal(run(slice(None))[3], run(slice(3, 4))[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend: str) -> None:
    params = make_picnn(5, (6, 6), curvature=True)
    context, levels = inputs(3, 13)
    with poison():
        leaves = [context.requires_grad_(), levels.requires_grad_(), *(t.requires_grad_() for t in params.tensors())]
        value, gradient = picnn_map(params, context, levels, backend=backend)
        grads = torch.autograd.grad((value + gradient).sum(), leaves)
    assert all(bool(torch.isfinite(t).all()) for t in (value, gradient, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_shared_levels(backend: str) -> None:
    params = make_picnn(5, (6, 6))
    wide_context, wide_levels = inputs(6, 8, width=10)
    context, levels = wide_context[::2, ::2], wide_levels.T[:3].contiguous().T[::2]
    expected = picnn_map(params, context.contiguous(), levels.contiguous(), backend="reference")
    torch.testing.assert_close(picnn_map(params, context, levels, backend=backend), expected)
    shared = picnn_map(params, context, levels[0], backend=backend)
    torch.testing.assert_close(
        shared, picnn_map(params, context, levels[:1].expand(3, -1).contiguous(), backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    params = make_picnn(5, (6, 6))
    context, levels = torch.zeros(shape[0], 5).double().requires_grad_(), torch.zeros(shape).double()
    value, gradient = picnn_map(params, context, levels, backend=backend)
    assert value.shape == gradient.shape == shape
    (value.sum() + gradient.sum()).backward()
    assert context.grad is not None
    assert context.grad.shape == context.shape


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    levels=st.integers(1, 20),
    width=st.integers(1, 9),
    depth=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_backends_agree_on_any_shape(rows: int, levels: int, width: int, depth: int, seed: int) -> None:
    params = make_picnn(5, (width,) * depth, curvature=True, seed=seed)
    context, points = inputs(rows, levels, seed=seed)
    leaves = [context.requires_grad_(), points.requires_grad_(), *(t.requires_grad_() for t in params.tensors())]
    results = []
    for backend in BACKENDS:
        value, gradient = picnn_map(params, context, points, backend=backend)
        grads = torch.autograd.grad((value.square() + gradient).sum(), leaves)
        results.append((value, gradient, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_extreme_inputs_stay_finite() -> None:
    params = make_picnn(5, (8, 8), dtype=torch.float32)
    context = torch.full((2, 5), 1e4)
    for backend in BACKENDS:
        value, gradient = picnn_map(params, context, torch.tensor([-1e3, 0.0, 1e3]), backend=backend)
        assert bool(torch.isfinite(value).all())
        assert bool(torch.isfinite(gradient).all())


def test_every_backend_has_the_same_parameters() -> None:
    signatures = {tuple(inspect.signature(load("picnn", b).picnn_levels).parameters) for b in BACKENDS}
    assert len(signatures) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": [[1.0]]}, TypeError, "context must be a torch.Tensor, got list"),
        ({"context": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "context must have dtype float32 .* got int64"),
        ({"context": torch.zeros(2, 4).double()}, ValueError, "context must have width 5 .* got 4"),
        ({"context": torch.zeros(5).double()}, ValueError, r"context must have 2 dimension\(s\), got shape \(5,\)"),
        ({"levels": torch.zeros(3, 4).double()}, ValueError, "levels must have 2 rows like context, got 3"),
        ({"levels": torch.zeros(2, 3, 4).double()}, ValueError, "levels must have 1 or 2 dimension"),
        (
            {"levels": torch.zeros(4, device="meta").double()},
            ValueError,
            "levels must be on cpu like context, got meta",
        ),
        ({"backend": "fpga"}, ValueError, "backend must be 'auto' or one of .* got 'fpga'"),
        (
            {"backend": "cuda"},
            (RuntimeError, ValueError),
            "backend='cuda' (of picnn cannot be used here: .*|runs on cuda, got tensors on cpu); usable.*: reference",
        ),
        ({"params": "weights"}, TypeError, "params must be PicnnParams, got str"),
        (
            {"params": make_picnn(5, (4,), activation="gelu")},
            ValueError,
            "params.activation must be one of .* got 'gelu'",
        ),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {
        "params": make_picnn(5, (4, 4)),
        "context": torch.zeros(2, 5).double(),
        "levels": torch.zeros(3).double(),
    }
    arguments = good | change
    with pytest.raises(error, match=message):
        picnn_map(**arguments)  # type: ignore[arg-type]


def test_wrong_head_and_mixed_dtypes() -> None:
    params = make_picnn(5, (4, 4))
    context, levels = torch.zeros(2, 5).double(), torch.zeros(3).double()
    with pytest.raises(ValueError, match="heads must make 26 coefficients"):
        picnn_map(
            PicnnParams(wz=params.wz, heads=((params.heads[0][0][:-1], params.heads[0][1][:-1]),)), context, levels
        )
    mixed = PicnnParams(wz=(params.wz[0].float(), params.wz[1]), heads=params.heads)
    with pytest.raises(TypeError, match="every weight must have dtype"):
        picnn_map(mixed, context, levels)


def test_resolve_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("picnn") == ("cpu" if "cpu" in BACKENDS else "reference")
    monkeypatch.setenv("PRMFAST_BACKEND", "reference")
    assert resolve("picnn") == "reference"
    assert resolve("picnn", device_of(BACKENDS[-1]), backend=BACKENDS[-1]) == BACKENDS[-1]
    with pytest.raises(ValueError, match="room must be one of"):
        resolve("pool")
    assert ops.picnn_map is picnn_map.__wrapped__  # type: ignore[attr-defined]


def test_without_the_extension_the_reference_runs() -> None:
    code = (
        "import sys; sys.modules['prmfast._C'] = None\n"
        "from prmfast.ops import available, resolve\n"
        "assert available('picnn') == ('reference',) and resolve('picnn') == 'reference'\n"
        "try: resolve('picnn', backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "pip install -e ." in told.stdout
