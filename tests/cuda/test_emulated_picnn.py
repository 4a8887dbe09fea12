"""Room picnn's CUDA levels kernel and its adapter, emulated, against the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from prmfast.kernels.picnn import reference
from prmfast.kernels.picnn.params import CoefficientLayout, LevelOptions, PicnnParams
from prmfast.kernels.picnn.tuning import CUDA_DEEPEST, CUDA_WIDEST
from prmfast.testing import make_picnn
from tests.cuda.adapters import adapter, guarded
from tests.cuda.library import Library
from tests.cuda.picnn_emulated import EmulatedPicnn

WIDTHS = {"one": (1,), "odd": (7, 9, 6), "calibrator": (32, 32), "deep": (64, 64, 64, 64)}
SHAPES = {"one": (1, 1), "rows": (5, 11), "hundred": (2, 100), "tile+1": (5, 129)}
NETWORKS = {
    "softplus": {"curvature": True, "curvature_floor": 1e-3},
    "relu-gate": {"gate": "relu"},
    "squared": {"square_first": True},
    "leaky": {"activation": "leaky_relu", "square_first": True},
    "relu": {"activation": "relu", "curvature": True},
}
each_width = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


pytestmark = pytest.mark.xdist_group("emulated_picnn")  # the library is compiled once


@pytest.fixture(scope="module")
def kernels() -> EmulatedPicnn:
    return EmulatedPicnn()


@pytest.fixture
def library(kernels: EmulatedPicnn) -> Library:
    return kernels.library.on(90)


@pytest.fixture
def cuda(kernels: EmulatedPicnn, library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = adapter(library, "picnn", offers=kernels)
    monkeypatch.setattr(torch, "empty", functools.partial(guarded, library))
    return module


def problem(
    widths: tuple[int, ...], rows: int, levels: int, *, seed: int = 1, steepness: float = 1.0, **options: object
) -> tuple[PicnnParams, Tensor, Tensor]:
    """A float32 network, raw coefficient rows [B, P] and levels [B, M]."""
    generator = torch.Generator().manual_seed(seed)
    params = make_picnn(5, widths, dtype=torch.float32, seed=seed, **options)
    raw = reference.context_stage(params, torch.randn(rows, 5, generator=generator))
    raw[:, : 2 * widths[0]] *= steepness
    return params, raw, torch.rand(rows, levels, generator=generator)


def run(
    cuda: ModuleType,
    params: PicnnParams,
    rows: Tensor,
    levels: Tensor,
    precision: str = "float32",
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    value, gradient = cuda.picnn_levels(
        rows, levels, params.wz, options=params.options, tolerance=tolerance, precision=precision
    )
    return value, gradient


def truth(params: PicnnParams, rows: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    wz = [w.double() for w in params.wz]
    options = params.options
    return reference.picnn_levels(
        rows.double(), levels.double(), wz, options=options, tolerance=0.0, precision="float32"
    )


def errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of value and gradient: the largest over the mean magnitude."""
    value, gradient = (float((f - e).abs().max() / e.abs().mean()) for f, e in zip(found, exact, strict=True))
    return value, gradient


@each_shape
@each_width
@pytest.mark.parametrize("network", NETWORKS)
def test_three_products_are_float32(
    cuda: ModuleType, widths: tuple[int, ...], shape: tuple[int, int], network: str
) -> None:
    params, rows, levels = problem(widths, *shape, **NETWORKS[network])
    value, gradient = errors(run(cuda, params, rows, levels), truth(params, rows, levels))
    assert value <= 3e-5
    assert gradient <= 3e-5


@each_shape
@each_width
def test_one_product_is_bfloat16(cuda: ModuleType, widths: tuple[int, ...], shape: tuple[int, int]) -> None:
    params, rows, levels = problem(widths, *shape, curvature=True)
    exact = truth(params, rows, levels)
    value, gradient = errors(run(cuda, params, rows, levels, "bfloat16"), exact)
    assert value <= 1e-2
    assert gradient <= 1e-2
    if len(widths) > 1:  # one layer has no products
        assert gradient > 3 * errors(run(cuda, params, rows, levels), exact)[1]


def test_softplus_and_sigmoid_within_3e_7(cuda: ModuleType) -> None:
    """g = softplus(x) where slope and gate are 1 and everything else is 0."""
    layout = CoefficientLayout((1, 1))
    rows = torch.zeros(1, layout.size - 1)
    rows[:, layout.slope(0)] = rows[:, layout.gate(1)] = 1.0
    x = torch.cat([torch.linspace(-8, 8, 20001), torch.linspace(-120, 120, 999), torch.tensor([0.0, -0.0, 1e-30])])
    options = LevelOptions(gate="relu")
    value, gradient = cuda.picnn_levels(
        rows, x[None], [torch.ones(1, 1)], options=options, tolerance=0.0, precision="float32"
    )
    size = x.double().clamp(min=1.0)
    assert bool(((value[0] - torch.nn.functional.softplus(x.double(), threshold=50)).abs() <= 3e-7 * size).all())
    assert bool(((gradient[0] - torch.sigmoid(x.double())).abs() <= 3e-7).all())


@pytest.mark.parametrize("how", ["float32", "interpolated", "bfloat16"])
@pytest.mark.parametrize("steepness", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "ties"])
def test_the_gradient_never_falls(cuda: ModuleType, how: str, steepness: float, order: str) -> None:
    params, rows, levels = problem((16, 16), 4, 77, steepness=steepness)
    levels = (levels * 20).round() / 20
    if order != "ties":
        levels = levels + 1e-7 * torch.rand(levels.shape)  # rounding decides the order of neighbours
    if order in ("ascending", "descending"):
        levels = levels.sort(1, descending=order == "descending").values
    precision = "bfloat16" if how == "bfloat16" else "float32"
    gradient = run(cuda, params, rows, levels, precision, 1e-5 if how == "interpolated" else 0.0)[1]
    sorted_order = levels.argsort(dim=1, stable=True)
    assert bool((gradient.gather(1, sorted_order).diff(dim=1) >= 0).all())
    exact, limit = truth(params, rows, levels)[1], {"float32": 3e-5, "interpolated": 4e-5, "bfloat16": 1e-2}[how]
    assert errors((gradient, gradient), (exact, exact))[1] <= limit


@pytest.mark.parametrize("negative", [0, 1])
def test_only_a_convex_network_is_kept_in_order(cuda: ModuleType, negative: int) -> None:
    """g = w_1 s(w_0 s(x)), whose slope falls somewhere if either is negative: a matrix, and the last layer's row."""
    layout = CoefficientLayout((1, 1, 1))
    rows = torch.zeros(1, layout.size - 1)
    for where in (layout.slope(0), layout.gate(1), layout.gate(2)):
        rows[:, where] = 1.0
    wz = [torch.full((1, 1), -1.0 if i == negative else 1.0) for i in range(2)]
    options, levels = LevelOptions(gate="relu"), torch.linspace(-6, 6, 40)[None]
    keywords = {"options": options, "tolerance": 0.0, "precision": "float32"}
    exact = reference.picnn_levels(rows.double(), levels.double(), [w.double() for w in wz], **keywords)
    assert bool((exact[1].diff(dim=1) < -1e-2).any())
    assert errors(cuda.picnn_levels(rows, levels, wz, **keywords), exact)[1] <= 3e-5


@pytest.mark.parametrize("widths", [(7, 9, 6), (64, 64)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch(
    cuda: ModuleType, library: Library, widths: tuple[int, ...], precision: str
) -> None:
    params, rows, levels = problem(widths, 23, 11, curvature=True)
    library.on(90, multiprocessors=1)  # few processors: many contexts a block, tiles that hold several
    batch = run(cuda, params, rows, levels, precision)
    packed = library.launches[0]
    for capability, processors, backwards in ((80, 4, True), (90, 132, False)):
        library.on(capability, multiprocessors=processors, backwards=backwards)
        again = run(cuda, params, rows, levels, precision)
        assert library.launches[0] != packed
        for ours, theirs in zip(again, batch, strict=True):
            assert torch.equal(ours, theirs)
    for i in (0, 7, 22):
        alone = run(cuda, params, rows[i : i + 1], levels[i : i + 1], precision)
        turned = run(cuda, params, rows[i : i + 1], levels[i : i + 1].flip(1), precision)
        for ours, other, theirs in zip(alone, turned, batch, strict=True):
            assert torch.equal(ours[0], theirs[i])
            assert torch.equal(other[0].flip(0), theirs[i])


@pytest.mark.parametrize("widths", [(7, 9, 6), (32, 32), (64, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("steepness", [0.1, 1.0, 30.0, 1000.0])
def test_interpolation_keeps_its_tolerance(cuda: ModuleType, widths: tuple[int, ...], steepness: float) -> None:
    """Row by row: 1e-5 of the row's mean magnitude beside what direct evaluation has."""
    params, rows, levels = problem(widths, 4, 70, steepness=steepness, curvature=True)
    levels[1] = torch.linspace(0.005, 0.995, 70)
    levels[2] = torch.linspace(0.3, 0.31, 70)
    exact = truth(params, rows, levels)[1]

    def error(tolerance: float) -> Tensor:
        found = run(cuda, params, rows, levels, tolerance=tolerance)[1]
        return (found.double() - exact).abs().amax(1) / exact.abs().mean(1)

    direct = error(0.0)
    for tolerance in (1e-5, 1e-4):
        assert bool((error(tolerance) <= direct + 1e-6 + tolerance).all())


def test_interpolation_happens_where_it_can(cuda: ModuleType, library: Library) -> None:
    """Smooth rows are interpolated, some of them from 65 points; steps, and rows of one level, are evaluated."""
    params, rows, levels = problem((32, 32), 16, 100, curvature=True)
    rows[:3, :64] *= 1000.0
    levels[3] = 0.25
    rows[4:10, :64] *= 6.0
    library.on(90, multiprocessors=1)

    def evaluated(m: int) -> list[bool]:
        direct = run(cuda, params, rows, levels[:, :m])
        found = run(cuda, params, rows, levels[:, :m], tolerance=1e-5)
        torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-4)
        both = [(d == f).all(1) for d, f in zip(direct, found, strict=True)]
        assert torch.equal(*both)
        return [bool(same) for same in both[0]]

    assert evaluated(100) == [True] * 4 + [False] * 12
    few = evaluated(80)  # too few for 65 points
    assert any(few[4:10])
    assert few[:4] + few[10:] == [True] * 4 + [False] * 6


@pytest.mark.parametrize(("precision", "m"), [("bfloat16", 100), ("float32", 43)])
def test_where_nothing_is_interpolated(cuda: ModuleType, library: Library, precision: str, m: int) -> None:
    params, rows, levels = problem((32, 32), 3, m)
    direct = run(cuda, params, rows, levels, precision)
    found = run(cuda, params, rows, levels, precision, 1e-5)
    assert all(torch.equal(d, f) for d, f in zip(direct, found, strict=True))
    assert library.launches[0] == library.launches[1]


@pytest.mark.parametrize("widths", [(7, 9, 6), (64, 64)], ids=str)
def test_an_interpolated_row_does_not_depend_on_its_batch(
    cuda: ModuleType, library: Library, widths: tuple[int, ...]
) -> None:
    params, rows, levels = problem(widths, 17, 90, curvature=True)
    rows[::3, : 2 * widths[0]] *= 30.0
    library.on(80, multiprocessors=1, backwards=True)
    batch = run(cuda, params, rows, levels, tolerance=1e-5)
    library.on(90, multiprocessors=132)
    again = run(cuda, params, rows, levels, tolerance=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True))
    for i in (0, 8, 16):
        alone = run(cuda, params, rows[i : i + 1], levels[i : i + 1], tolerance=1e-5)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, batch, strict=True))


def test_nan_where_rows_are_interpolated(cuda: ModuleType) -> None:
    params, rows, levels = problem((16, 16), 4, 60, curvature=True)
    clean = run(cuda, params, rows, levels, tolerance=1e-5)
    rows[1, 0] = torch.nan
    levels[2, 6] = torch.nan
    for ours, theirs in zip(run(cuda, params, rows, levels, tolerance=1e-5), clean, strict=True):
        assert bool(ours[1].isnan().all())
        assert ours[2].isnan().nonzero().tolist() == [[6]]
        assert torch.equal(ours[[0, 3]], theirs[[0, 3]])


def test_strides(cuda: ModuleType) -> None:
    params, rows, levels = problem((9, 9), 6, 13)
    one = levels[:1].clone()
    wide = torch.full((6, rows.shape[1] + 3), torch.nan)
    wide[:, :-3] = rows
    expected = run(cuda, params, rows, one.repeat(6, 1))
    for given, at in (
        (wide[:, :-3], one.expand(6, -1)),
        (rows.t().contiguous().t(), one.repeat(6, 2)[:, :13]),
        (rows, one.t().repeat(1, 6).t()),
    ):
        found = run(cuda, params, given, at)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    shared = run(cuda, params, rows[:1].expand(4, -1), levels[:4])
    assert torch.equal(shared[1], run(cuda, params, rows[:1].repeat(4, 1), levels[:4])[1])
    column = run(cuda, params, rows, levels[:, 3:4])
    assert all(torch.equal(c, e) for c, e in zip(column, run(cuda, params, rows, levels[:, 3:4].clone()), strict=True))


def test_nothing_is_launched_for_nothing(cuda: ModuleType, library: Library) -> None:
    params, rows, levels = problem((7,), 3, 5)
    for r, x in ((rows[:0], levels[:0]), (rows, levels[:, :0])):
        assert all(out.shape == x.shape for out in run(cuda, params, r, x))
    assert library.launches == []


def test_a_nan_stays_in_its_row(cuda: ModuleType, library: Library) -> None:
    params, rows, levels = problem((16, 16), 5, 11)
    library.on(90, multiprocessors=1)
    clean = run(cuda, params, rows, levels)
    poisoned, at = rows.clone(), levels.clone()
    poisoned[2, 3] = torch.nan
    at[4, 6] = torch.nan
    found = run(cuda, params, poisoned, at)
    for ours, theirs in zip(found, clean, strict=True):
        assert bool(ours[2].isnan().all())
        assert ours[4].isnan().nonzero().tolist() == [[6]]
        assert torch.equal(ours[[0, 1, 3]], theirs[[0, 1, 3]])


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize(("how", "m"), [("float32", 3), ("bfloat16", 3), ("interpolated", 50)])
def test_the_largest_network(cuda: ModuleType, library: Library, kilobytes: int, how: str, m: int) -> None:
    """In the shared memory that sm_86, sm_80 and sm_90 give a block."""
    params, rows, levels = problem((CUDA_WIDEST,) * CUDA_DEEPEST, 9, m)
    library.on(80, shared_bytes=kilobytes * 1024, multiprocessors=1)
    precision, tolerance = ("bfloat16" if how == "bfloat16" else "float32"), (1e-5 if how == "interpolated" else 0.0)
    found = run(cuda, params, rows, levels, precision, tolerance)
    assert errors(found, truth(params, rows, levels))[1] <= (1e-2 if how == "bfloat16" else 3e-5)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((1,) * (CUDA_DEEPEST + 1), "have 1 to 6 hidden layers, got 7"), ((8, CUDA_WIDEST + 1), "be at most 64, got 65")],
)
def test_larger_networks_are_refused(cuda: ModuleType, widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"must {message}"):
        cuda.network_of((*widths, 1), LevelOptions())
