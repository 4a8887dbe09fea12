"""The serving head: its one launch, emulated, and its form in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast.kernels.ias.reference import ias_budget
from prmfast.kernels.picnn.params import PicnnParams
from prmfast.kernels.picnn.reference import context_stage, picnn_levels
from prmfast.kernels.picnn.tuning import CUDA_DEEPEST, CUDA_HEAD_INPUTS, CUDA_HEAD_LEVELS, CUDA_WIDEST
from prmfast.ops import serving_head as head
from prmfast.ops.serving_head import Served, ServingHead
from prmfast.testing import make_picnn
from tests.cuda.adapters import adapter
from tests.cuda.library import Library
from tests.cuda.picnn_emulated import EmulatedPicnn

ELEVEN = [i / 10 for i in range(11)]
MIDPOINTS = [(i + 0.5) / 100 for i in range(100)]


pytestmark = pytest.mark.xdist_group("emulated_picnn")  # the library is compiled once


@pytest.fixture(scope="module")
def kernels() -> EmulatedPicnn:
    return EmulatedPicnn()


@pytest.fixture
def library(kernels: EmulatedPicnn) -> Library:
    return kernels.library.on(90)


@pytest.fixture
def fused(kernels: EmulatedPicnn, library: Library, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServingHead]:
    """`ServingHead` on the emulated kernels."""
    module = adapter(library, "picnn", offers=kernels)

    def make(*args: Any, **options: Any) -> ServingHead:
        with monkeypatch.context() as patch:
            patch.setattr(head, "resolve", lambda *_, **__: "cuda")
            patch.setitem(sys.modules, "prmfast.ops._cuda.picnn", module)
            made = ServingHead(*args, **options)
        assert made.fused
        return made

    return make


def network(widths: tuple[int, ...] = (32, 32), context: int = 6, seed: int = 0) -> PicnnParams:
    """Context -> 7 -> 5 -> a network whose map spreads over a few units."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((7, context), (7,), (5, 7), (5,))
    w0, b0, w1, b1 = (torch.randn(shape, generator=g) for shape in shapes)
    return replace(make_picnn(5, widths, dtype=torch.float32, seed=seed, curvature=True), encoder=((w0, b0), (w1, b1)))


def contexts(rows: int, width: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def truth(params: PicnnParams, context: Tensor, levels: list[float], link: str) -> tuple[Tensor, float]:
    """Quantiles in float64, and the error that 3e-5 of the map's mean magnitude allows them."""
    exact = params.to(dtype=torch.float64)
    at = torch.tensor(levels, dtype=torch.float32).double().expand(len(context), -1)
    rows = context_stage(exact, context.double())
    options = {"options": exact.options, "tolerance": 0.0, "precision": "float32"}
    mapped = picnn_levels(rows, at, exact.wz, **options)[1]  # type: ignore[arg-type]
    return (mapped.sigmoid() if link == "sigmoid" else mapped.clamp(0, 1)), 3e-5 * float(mapped.abs().mean())


def check(served: Served, exact: tuple[Tensor, float], target: Tensor | float, n_max: int) -> None:
    """Quantiles and means against float64; budgets are exactly those of the head's own quantiles."""
    quantiles, limit = exact
    assert float((served.quantiles - quantiles).abs().max()) <= limit
    assert served.budget.dtype == torch.int32
    assert torch.equal(served.budget, ias_budget(served.quantiles, target, n_max))
    assert bool(((served.quantiles >= 0) & (served.quantiles <= 1)).all())
    assert bool((served.quantiles.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("widths", [(1,), (7, 9, 6), (32, 32), (64, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("levels", [ELEVEN, MIDPOINTS, [i / 128 for i in range(129)]], ids=len)
@pytest.mark.parametrize("link", ["sigmoid", "clip"])
def test_the_launch_equals_plain_torch(
    fused: Callable[..., ServingHead], library: Library, widths: tuple[int, ...], levels: list[float], link: str
) -> None:
    settings = {"target": 0.9, "n_max": 64, "max_batch": 5, "link": link}
    ours, theirs = fused(network(widths), levels, **settings), ServingHead(network(widths), levels, **settings)
    assert not theirs.fused
    for rows in (1, 5):
        library.on(90)
        exact = truth(network(widths), contexts(rows), levels, link)
        check(ours.run(contexts(rows)), exact, 0.9, 64)
        assert len(library.launches) == 1
        check(theirs.run(contexts(rows)), exact, 0.9, 64)


def test_bfloat16_is_near(fused: Callable[..., ServingHead]) -> None:
    settings = {"target": 0.9, "n_max": 64, "max_batch": 3}
    exact = ServingHead(network(), ELEVEN, **settings).run(contexts(3)).quantiles
    near = fused(network(), ELEVEN, precision="bfloat16", **settings).run(contexts(3)).quantiles
    assert 1e-6 < float((near - exact).abs().max()) < 1e-2


@pytest.mark.parametrize("n_max", [1, 2, 3, 64, 65, 1000, 2**31 - 1])
def test_budgets_up_to_any_n(fused: Callable[..., ServingHead], n_max: int) -> None:
    rows, limit = contexts(17), min(n_max, 3000)
    low = network()
    weight, bias = low.heads[0]
    bias = bias.clone()
    bias[128] = -6.0  # the output's slope: success is rare
    low = replace(low, heads=((weight, bias),))
    for target in (0.3, 0.9, 0.999):
        found = fused(low, MIDPOINTS, target=target, n_max=n_max, max_batch=17).run(rows)
        exact = ias_budget(found.quantiles, target, limit)
        assert torch.equal(found.budget.clamp(max=limit), exact)
        if n_max == 64 and target == 0.9:
            assert len(exact.unique()) > 5


def test_targets_of_rows_and_where_the_curve_touches_them(fused: Callable[..., ServingHead]) -> None:
    """A target that S(N) reaches exactly is reached."""
    settings = {"target": 0.5, "n_max": 64, "max_batch": 6}
    ours, theirs = fused(network(), ELEVEN, **settings), ServingHead(network(), ELEVEN, **settings)
    quantiles = ours.run(contexts(6)).quantiles.double()
    wanted = torch.tensor([1, 2, 3, 5, 17, 60])
    targets = 1 - ((1 - quantiles) ** wanted[:, None]).mean(1)
    found = ours.run(contexts(6), targets)
    assert found.budget.tolist() == wanted.tolist()
    exact = truth(network(), contexts(6), ELEVEN, "sigmoid")
    check(found, exact, targets, 64)
    check(theirs.run(contexts(6), targets), exact, targets, 64)
    spread = torch.stack([targets, torch.full_like(targets, torch.nan)], 1)[:, 0]
    assert found.budget.tolist() == ours.run(contexts(6), spread).budget.tolist()


def test_the_mean_is_the_calibrators(fused: Callable[..., ServingHead]) -> None:
    served = fused(network(), ELEVEN, target=0.9, n_max=64).run(contexts(9))
    torch.testing.assert_close(served.expected, torch.trapezoid(served.quantiles, dx=0.1, dim=1), rtol=1e-6, atol=1e-6)
    uneven = [0.0, 0.1, 0.5, 0.9, 1.0]
    served = fused(network(), uneven, target=0.9, n_max=64).run(contexts(9))
    by_torch = torch.trapezoid(served.quantiles, torch.tensor(uneven), dim=1)
    torch.testing.assert_close(served.expected, by_torch, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["transitions", "wide"])
def test_rows_that_torch_makes(fused: Callable[..., ServingHead], library: Library, kind: str) -> None:
    """Of a network with transitions, and where the affine head has more inputs than the launch holds."""
    if kind == "wide":
        params, rows = make_picnn(600, (8, 8), dtype=torch.float32, curvature=True), contexts(5, 600)
    else:
        g, inner = torch.Generator().manual_seed(0), make_picnn(5, (8, 8), dtype=torch.float32, curvature=True)
        sizes = ((7, 6, 16), (5, 7, 35))
        params = replace(
            inner,
            transitions=tuple((torch.randn(u, c, generator=g), torch.randn(u, generator=g)) for u, c, _ in sizes),
            heads=tuple((torch.randn(n, u, generator=g) / u, torch.zeros(n)) for u, _, n in sizes),
        )
        rows = contexts(5, 6)
    settings = {"target": 0.9, "n_max": 64, "max_batch": 5}
    ours, theirs = fused(params, ELEVEN, **settings), ServingHead(params, ELEVEN, **settings)
    assert ours._kernel is not None
    assert ours._kernel.fixed["inputs"] == 0
    library.on(90)
    exact = truth(params, rows, ELEVEN, "sigmoid")
    check(ours.run(rows), exact, 0.9, 64)
    check(theirs.run(rows), exact, 0.9, 64)
    assert len(library.launches) == 1


@pytest.mark.parametrize("widths", [(9, 9), (64, 64, 64, 64)], ids=str)
def test_a_row_does_not_depend_on_its_batch(
    fused: Callable[..., ServingHead], library: Library, widths: tuple[int, ...]
) -> None:
    params = replace(network(widths), encoder=())
    served = fused(params, ELEVEN, target=0.9, n_max=64, max_batch=23)
    rows = contexts(23, 5)
    found, shapes = [], set()
    for processors, backwards in ((132, False), (12, True), (6, False), (1, True)):  # 1, 2, 4 and 4 contexts a block
        library.on(80, multiprocessors=processors, backwards=backwards)
        found.append(Served(*(t.clone() for t in served.run(rows))))
        shapes.add(library.launches[0])
    assert len(shapes) >= 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    library.on(90)
    for i in (0, 11, 22):
        alone = served.run(rows[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, found[0], strict=True))


def test_the_head_in_the_launch_is_the_head_before_it(fused: Callable[..., ServingHead]) -> None:
    params = replace(network((16, 16)), encoder=())
    rows = contexts(4, 5)
    made = fused(params, ELEVEN, target=0.9, n_max=64)
    inside = made.run(rows).quantiles.clone()
    assert made._kernel is not None
    made._kernel.fixed |= {"weight": 0, "bias": 0, "inputs": 0}
    out = Served(*(memory[:4] for memory in made._served))
    made._kernel(context_stage(params, rows), None, out)
    torch.testing.assert_close(out.quantiles, inside, rtol=0, atol=1e-5)


def test_the_largest_head(fused: Callable[..., ServingHead], library: Library) -> None:
    """In the 99 KB of shared memory of an sm_86."""
    params = make_picnn(CUDA_HEAD_INPUTS, (CUDA_WIDEST,) * CUDA_DEEPEST, dtype=torch.float32, curvature=True)
    levels, rows = [i / 1024 for i in range(CUDA_HEAD_LEVELS)], contexts(2, CUDA_HEAD_INPUTS)
    made = fused(params, levels, target=0.9, n_max=64, max_batch=2)
    library.on(80, shared_bytes=99 * 1024, multiprocessors=1)
    check(made.run(rows), truth(params, rows, levels, "sigmoid"), 0.9, 64)


@pytest.mark.parametrize("form", ["launch", "torch"])
def test_a_row_with_nan_says_so(fused: Callable[..., ServingHead], form: str) -> None:
    make = fused if form == "launch" else ServingHead
    served = make(network(), ELEVEN, target=0.9, n_max=64, max_batch=4)
    rows = contexts(4)
    clean = Served(*(t.clone() for t in served.run(rows)))
    rows[2, 1] = torch.nan
    found = served.run(rows)
    assert found.expected.isnan().tolist() == [False, False, True, False]
    assert int(found.budget[2]) == 0
    others = [0, 1, 3]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, clean, strict=True))


@pytest.mark.parametrize("form", ["launch", "torch"])
def test_a_captured_call_reads_its_context_again(fused: Callable[..., ServingHead], form: str) -> None:
    make = fused if form == "launch" else ServingHead
    served = make(network(), ELEVEN, target=0.9, n_max=64, max_batch=8)
    captured = served.capture(5)
    assert captured.context.shape == (5, 6)
    captured.context.copy_(contexts(5))
    captured.replay()
    found = Served(*(t.clone() for t in captured.served))
    expected = served.run(contexts(5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert expected.quantiles.data_ptr() == captured.served.quantiles.data_ptr()


@pytest.mark.parametrize("form", ["launch", "torch"])
def test_weights_are_the_heads_own(fused: Callable[..., ServingHead], form: str) -> None:
    make, params = fused if form == "launch" else ServingHead, network()
    for tensor in params.tensors():
        tensor.requires_grad_()
    served = make(params, ELEVEN, target=0.9, n_max=64, max_batch=3)
    before = Served(*(t.clone() for t in served.run(contexts(3))))
    with torch.no_grad():
        for tensor in params.tensors():
            tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(served.run(contexts(3)), before, strict=True))


def test_half_contexts_and_none(fused: Callable[..., ServingHead], library: Library) -> None:
    served = fused(network(), ELEVEN, target=0.9, n_max=64, max_batch=8)
    rows = contexts(3).bfloat16()
    assert torch.equal(served.run(rows).quantiles.clone(), served.run(rows.float()).quantiles)
    library.on(90)
    assert served.run(contexts(0)).quantiles.shape == (0, 11)
    assert library.launches == []


def test_it_says_what_is_wrong() -> None:
    settings: dict[str, Any] = {"target": 0.9, "n_max": 64, "max_batch": 4}
    for changed, message in (
        ({"target": 1.0}, r"target must lie in \(0, 1\), got 1.0"),
        ({"n_max": 0}, "n_max must be >= 1"),
        ({"max_batch": 0}, "max_batch must be >= 1, got 0"),
        ({"link": "probit"}, "link must be one of .*, got 'probit'"),
        ({"precision": "int8"}, "precision must be one of .*, got 'int8'"),
        ({"levels": [0.5]}, r"levels must be at least two in ascending order, got \[0.5\]"),
        ({"levels": [0.5, 0.5]}, "levels must be at least two in ascending order"),
    ):
        given = {"levels": ELEVEN, **settings, **changed}
        with pytest.raises(ValueError, match=f"ServingHead: {message}"):
            ServingHead(network(), given.pop("levels"), **given)
    served = ServingHead(network(), ELEVEN, **settings)
    with pytest.raises(ValueError, match=r"context must have shape \(at most 4, 6\), got \(5, 6\)"):
        served.run(contexts(5))
    with pytest.raises(ValueError, match=r"context must have shape \(at most 4, 6\), got \(2, 5\)"):
        served.run(contexts(2, 5))
    with pytest.raises(TypeError, match="targets must have dtype float64"):
        served.run(contexts(2), torch.rand(2))
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\), got \(3,\)"):
        served.run(contexts(2), torch.rand(3).double())
