from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast import ops
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.ops import available, picnn_map, resolve
from prmfast.ops._backends import load
from prmfast.ops.picnn import context_stage
from prmfast.testing import assert_within_budget, make_inputs, make_picnn, poison

BACKENDS = available("picnn")
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


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend: str) -> None:
    params = make_picnn(3, (4, 3))
    context, levels = inputs(2, 3, width=3)
    for expand in (False, True):
        points = levels[:1].expand(2, -1) if expand else levels
        rows = context_stage(params, context).requires_grad_()
        arguments = (rows, points, list(params.wz), *params.options, 1e-5, backend)
        torch.library.opcheck(torch.ops.prmfast.picnn_levels.default, arguments)
    rows, wz = context_stage(params, context), list(params.wz)
    backward = (levels, levels, rows, levels, wz, *params.options, backend)
    torch.library.opcheck(torch.ops.prmfast.picnn_levels_backward.default, backward)
    linears = [torch.randn(4, 3).double(), torch.randn(4).double(), torch.randn(*rows.shape[1:], 4).double(), rows[0]]
    scales, before = [torch.rand(2, 4).double()], [torch.randn(2, 4).double()]
    for context_gradient in (False, True):
        leaf = context.clone().requires_grad_(context_gradient)
        learnt = [t.detach().clone().requires_grad_() for t in linears]
        network = (leaf, levels, learnt, scales, wz, "silu", *params.options, 1e-5, backend)
        torch.library.opcheck(torch.ops.prmfast.picnn_network.default, network)
        backward = (levels, levels, context, levels, linears, scales, wz, rows, before, "silu", context_gradient)
        opcheck_arguments = (*backward, *params.options, backend)
        torch.library.opcheck(torch.ops.prmfast.picnn_network_backward.default, opcheck_arguments)


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
        arguments = (coefficients[rows], levels[rows], list(params.wz), *params.options, 1e-5, backend)
        return torch.ops.prmfast.picnn_levels(*arguments)[1]

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
            {"backend": "triton"},
            RuntimeError,
            "backend='triton' of picnn cannot be used here: .*; usable on cpu: reference",
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
    assert resolve("picnn") == BACKENDS[-1]
    monkeypatch.setenv("PRMFAST_BACKEND", "reference")
    assert resolve("picnn") == "reference"
    assert resolve("picnn", backend=BACKENDS[-1]) == BACKENDS[-1]
    with pytest.raises(ValueError, match="room must be one of"):
        resolve("pool")
    assert ops.picnn_map is picnn_map


def test_without_the_extension_the_reference_runs() -> None:
    code = (
        "import sys; sys.modules['prmfast._C'] = None\n"
        "from prmfast.ops import available, resolve\n"
        "assert available('picnn') == ('reference',) and resolve('picnn') == 'reference'\n"
        "try: resolve('picnn', backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert "pip install -e ." in told.stdout
