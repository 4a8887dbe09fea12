"""Room dist_ppo: every backend against the formula in float64 under autograd, laws, edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.kernels.dist_ppo import reference
from prmfast.ops import Candidates
from prmfast.testing import make_candidates, make_inputs, poison
from tests.ops.device import (
    backends,
    device_of,
    dist_ppo_loss,
    dist_ppo_loss_and_grad,
    interpreted,
    linear_dist_ppo_loss,
    moved,
    taking,
)

BACKENDS = backends("dist_ppo")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
COLUMNS = [1, 2, 15, 16, 17, 31, 33, 2047, 2049, 2064, 4099, 8208]
FEW_COLUMNS = {torch.float32: [1, 33, 2064, 4099], torch.bfloat16: [17, 8208], torch.float16: [2, 2049]}
"""In the interpreter: one tile and several, of both widths, where they are a multiple of 16 and where not."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.3, "temperature": 0.7},
    {"clip_low": 0.0, "clip_high": 0.0, "temperature": 2.5},
]


def inputs(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Candidates]:
    made = make_inputs("dist_ppo", rows, columns, dtype=dtype, seed=seed)
    return made["logits"], made["candidates"]  # type: ignore[return-value]


def entry_rows(candidates: Candidates) -> Tensor:
    return torch.arange(len(candidates.offsets) - 1).repeat_interleave(candidates.offsets.diff())


def by_formula(
    logits: Tensor,
    candidates: Candidates,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Equation 12 as printed, in float64 and under autograd."""
    rows = entry_rows(candidates)
    logp = (logits.double() / temperature).log_softmax(1)[rows, candidates.token_ids]
    old, advantage = candidates.policy_logp.double(), candidates.advantage.double()
    rho = (logp - old).exp()
    term = torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        term = torch.where(advantage < 0, torch.maximum(term, dual_clip * advantage), term)
    weight = (
        torch.full((len(logits),), 1 / max(len(logits), 1), dtype=torch.float64) if row_weight is None else row_weight
    )
    return -(weight.double()[rows] * old.exp() * term).sum()


def truth(logits: Tensor, candidates: Candidates, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.double().detach().clone().requires_grad_()
    loss = by_formula(leaf, candidates, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def assert_gradient(found: Tensor, expected: Tensor, slack: float = 1e-14, left: float = 0.0) -> None:
    """Within one rounding of the dtype, and float32 arithmetic (float64: ``slack``) of the row's largest entry.

    ``left`` is what float64 rounding may leave of g (1 - p) where p is nearly 1.
    """
    step = {torch.float64: slack, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[found.dtype]
    noise = 2.0**-24 if found.dtype == torch.float16 else 1e-12 + left  # half a float16 step; what is left of g - g
    scale = slack if found.dtype == torch.float64 else 1e-6
    allowed = step * expected.abs() + scale * expected.abs().amax(1, keepdim=True) + noise
    worst = (found.double() - expected).abs() - allowed
    assert found.shape == expected.shape
    assert not found.isnan().any()
    assert worst.numel() == 0 or worst.max() <= 0, float(worst.max())


def assert_loss(found: Tensor, expected: Tensor, candidates: Candidates, weight: Tensor | None = None) -> None:
    """Within float32 arithmetic of itself, or of the sum of the terms' sizes at rho = 1."""
    rows = len(candidates.offsets) - 1
    weight = torch.full((rows,), 1 / max(rows, 1)) if weight is None else weight
    size = (weight.double()[entry_rows(candidates)] * candidates.policy_logp.exp() * candidates.advantage).abs().sum()
    tolerance = 1e-13 if found.dtype == torch.float64 else 5e-7
    assert abs(float(found.detach()) - float(expected)) <= tolerance * max(float(size), abs(float(expected)))


@pytest.mark.parametrize(
    ("backend", "dtype", "columns"),
    [
        (backend, dtype, columns)
        for backend in BACKENDS
        for dtype in DTYPES
        for columns in (FEW_COLUMNS.get(dtype, [17]) if interpreted(backend) else COLUMNS)
    ],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "dual", "shut"])
def test_loss_and_gradient_are_the_formula(
    backend: str, dtype: torch.dtype, columns: int, options: dict[str, Any]
) -> None:
    logits, candidates = inputs(7, columns, dtype)
    if columns == 1 and options.get("clip_low") == 0.0:
        pytest.skip("rho = 1 at a clip of 0: every entry is a tie, see test_ties")
    if dtype == torch.float16:  # which has no room below 6e-8
        options = {**options, "row_weight": torch.full((7,), 100.0)}
    loss, grad = truth(logits, candidates, **options)
    leaf = logits.clone().requires_grad_()
    found = dist_ppo_loss(leaf, candidates, backend=backend, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_loss(found, loss, candidates, options.get("row_weight"))
    (3 * found).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert_gradient(leaf.grad, 3 * grad)
    with poison():
        again, fresh = dist_ppo_loss_and_grad(logits, candidates, backend=backend, **options)
    assert torch.equal(again, found)
    assert_gradient(fresh, grad)


@each_backend
@each_dtype
def test_gradient_goes_where_it_is_wanted(backend: str, dtype: torch.dtype) -> None:
    logits, candidates = inputs(6, 333, dtype)
    loss, expected = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
    for make_out in (
        lambda: torch.full((6, 333), torch.nan, dtype=dtype),
        lambda: torch.full((6, 400), torch.nan, dtype=dtype)[:, 67:],
        lambda: torch.full((12, 401), torch.nan, dtype=dtype)[::2, 1:334],
    ):
        out = make_out()
        got, same = dist_ppo_loss_and_grad(logits, candidates, out=out, backend=backend)
        assert same is out
        assert torch.equal(got, loss)
        assert torch.equal(out, expected)
    base = torch.full((6, 700), 7.0, dtype=dtype)
    beside = base[:, 340:673]
    beside.copy_(logits)
    for target in (beside, beside[:]):  # the same memory under another name is in place too
        beside.copy_(logits)
        got, same = dist_ppo_loss_and_grad(beside, candidates, out=target, backend=backend)
        assert same is target
        assert torch.equal(got, loss)
        assert torch.equal(beside, expected)
    assert (base[:, :340] == 7).all()
    assert (base[:, 673:] == 7).all()
    beside.copy_(logits)
    dist_ppo_loss_and_grad(
        beside, candidates, out=base[:, :333], backend=backend
    )  # interleaved rows, no shared element
    assert torch.equal(beside, logits)
    assert torch.equal(base[:, :333], expected)


@settings(max_examples=50, deadline=None)
@example(rows=3, columns=77, dtype=torch.float16, layout="columns", temperature=0.3, seed=0)
@given(
    rows=st.integers(0, 6),
    columns=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "rows", "columns", "transposed", "expanded"]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_any_shape_dtype_and_layout(
    rows: int, columns: int, dtype: torch.dtype, layout: str, temperature: float, seed: int
) -> None:
    base, _ = inputs(2 * rows, 2 * columns, dtype, seed)
    views: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: base[:rows, :columns].contiguous(),
        "rows": lambda: base[::2, 1 : columns + 1],
        "columns": lambda: base[:rows, ::2],
        "transposed": lambda: base[:rows, :columns].t().contiguous().t(),
        "expanded": lambda: base[:1, :columns].expand(rows, columns),
    }
    logits = views[layout]()
    candidates = make_candidates(logits / 1.5 - 0.1 * logits.roll(1, 0), p_min=0.05, every=2, seed=seed)
    weight = 0.1 + torch.rand(rows) * 200
    options = {"row_weight": weight, "temperature": temperature}
    loss, grad = truth(logits, candidates, **options)
    for backend in BACKENDS:
        found, gradient = dist_ppo_loss_and_grad(logits, candidates, backend=backend, **options)
        assert_loss(found, loss, candidates, weight)
        left = 1e-14 * float(weight.sum() * candidates.advantage.abs().sum()) / temperature
        assert_gradient(gradient, grad, left=left)


@each_backend
def test_gradcheck(backend: str) -> None:
    logits, candidates = inputs(4, 9, torch.float64)
    for options in OPTIONS[:2]:
        leaf = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, o=options: dist_ppo_loss(x, candidates, backend=backend, **o), (leaf,)
        )
        hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda h, w, o=options: linear_dist_ppo_loss(h, w, candidates, backend=backend, **o), (hidden, weight)
        )


# --- laws and edges


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_of_the_gradient_sums_to_zero(backend: str, dtype: torch.dtype) -> None:
    logits, candidates = inputs(30, 5000, dtype)
    _, grad = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
    size = grad.double().abs().sum(1)
    assert (size > 0).sum() > 10
    assert (grad.double().sum(1).abs() <= (1e-6 if dtype == torch.float32 else 1e-14) * size).all()


@each_backend
@each_dtype
def test_the_old_policy_itself(backend: str, dtype: torch.dtype) -> None:
    logits, _ = inputs(20, 300, dtype)
    candidates = make_candidates(logits)
    old, advantage = candidates.policy_logp.exp(), candidates.advantage
    loss, grad = dist_ppo_loss_and_grad(logits, candidates, row_weight=torch.ones(20), backend=backend)
    assert float(loss) == pytest.approx(-float((old * advantage).sum()), rel=2e-6)
    rows, p = entry_rows(candidates), logits.double().softmax(1)
    expected = torch.zeros(20, 300, dtype=torch.float64).index_put((rows, candidates.token_ids), -old * advantage)
    assert_gradient(grad, expected - expected.sum(1, keepdim=True) * p)


@each_backend
def test_rows_alone_and_threads_change_nothing(backend: str) -> None:
    rows = 9 if interpreted(backend) else 40
    for dtype in DTYPES[::2]:
        logits, candidates = inputs(rows, 3001, dtype)
        weight = torch.ones(rows)
        loss, grad = dist_ppo_loss_and_grad(logits, candidates, row_weight=weight, backend=backend)
        torch.set_num_threads(3)
        try:
            three, grad_three = dist_ppo_loss_and_grad(logits, candidates, row_weight=weight, backend=backend)
            leaf = logits.clone().requires_grad_()
            dist_ppo_loss(leaf, candidates, row_weight=weight, backend=backend).backward()
        finally:
            torch.set_num_threads(1)
        assert torch.equal(loss, three)
        assert torch.equal(grad, grad_three)
        assert leaf.grad is not None
        assert torch.equal(grad, leaf.grad)
        begin, end = candidates.offsets[7:9].tolist()
        one = Candidates(torch.tensor([0, end - begin]), *(field[begin:end] for field in candidates[1:]))
        assert torch.equal(
            dist_ppo_loss_and_grad(logits[7:8], one, row_weight=weight[:1], backend=backend)[1], grad[7:8]
        )


@each_backend
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_row_knows_nothing_of_its_batch(backend: str, dtype: torch.dtype) -> None:
    logits, candidates = inputs(7, 2112, dtype)
    rows, spans = entry_rows(candidates), candidates.offsets.tolist()
    device, backend = device_of(backend), taking("dist_ppo", backend, dtype=dtype)

    def run(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(spans[first], spans[last])
        some = Candidates(candidates.offsets[first : last + 1] - spans[first], *(t[part] for t in candidates[1:]))
        weight = torch.full((last - first,), 0.3)
        rule = [0.2, 0.28, math.inf, 0.7]
        there = moved((logits[first:last], list(some), weight), device)
        _, lse, coefficients = torch.ops.prmfast.dist_ppo(*there, rule, backend)
        _, grad = torch.ops.prmfast.dist_ppo_with_grad(*there, rule, backend)
        return lse.cpu(), coefficients.cpu(), grad.cpu()

    lse, coefficients, grad = run(0, 7)
    for row in (1, 2, 4):
        alone = run(row, row + 1)
        for one, other in zip(alone, (lse[row : row + 1], coefficients[rows == row], grad[row : row + 1]), strict=True):
            assert torch.equal(one, other)


@each_backend
def test_more_candidates_than_are_taken_at_a_time(backend: str) -> None:
    logits, _ = inputs(3, 2304, torch.float32)
    everywhere = torch.arange(0, 2304, 31)
    ids = torch.cat([torch.arange(40), everywhere, torch.tensor([2047, 2048, 2303])])
    offsets = torch.tensor([0, 40, 40 + len(everywhere), len(ids)])
    generator = torch.Generator().manual_seed(3)
    candidates = Candidates(
        offsets, ids, -6 + torch.randn(len(ids), generator=generator), torch.randn(len(ids), generator=generator)
    )
    loss, grad = truth(logits, candidates)
    found, gradient = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
    assert_loss(found, loss, candidates)
    assert_gradient(gradient, grad)
    leaf = logits.clone().requires_grad_()
    dist_ppo_loss(leaf, candidates, backend=backend).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, gradient)
    place = logits.clone()
    again, _ = dist_ppo_loss_and_grad(place, candidates, out=place, backend=backend)
    assert torch.equal(again, found)
    assert torch.equal(place, gradient)


@each_backend
def test_ties(backend: str) -> None:
    # Powers of two, so that every product is exact: four equal logits, rho = 1 and rho = 2 exactly.
    logits = torch.zeros(6, 4, dtype=torch.float64)
    old = torch.tensor([0.25, 0.25, 0.125, 0.125, 0.25, 0.25], dtype=torch.float64).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    candidates = Candidates(torch.arange(7), torch.tensor([0, 1, 2, 3, 0, 1]), old, advantage)
    for options in (
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_low": 0.0, "clip_high": 1.0},
        {"clip_low": 0.5, "clip_high": 0.0, "dual_clip": 2.0},
    ):
        leaf = logits.clone().requires_grad_()
        rows = entry_rows(candidates)
        new = leaf.log_softmax(1)[rows, candidates.token_ids]
        rule = reference.Rule(options["clip_low"], options["clip_high"], options.get("dual_clip"), 1.0)
        term = reference.terms(new, candidates, rule)
        (expected,) = torch.autograd.grad(-term.sum() / 6, leaf)
        loss, grad = dist_ppo_loss_and_grad(logits, candidates, backend=backend, **options)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-16)
        assert float(loss) == pytest.approx(-float(term.sum()) / 6, abs=1e-16)
        if backend != "reference":
            single = dist_ppo_loss_and_grad(logits.float(), candidates, backend=backend, **options)[1]
            torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-7)


@each_backend
@each_dtype
def test_one_token(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.3], [-200.0], [5.0]], dtype=dtype)
    candidates = Candidates(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0]), torch.zeros(2), torch.tensor([0.5, -2.0]))
    loss, grad = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
    assert float(loss) == pytest.approx(0.5)
    assert grad[2] == 0
    assert (grad.abs() <= 1e-13).all()


@each_backend
@each_dtype
def test_no_rows_and_no_candidates(backend: str, dtype: torch.dtype) -> None:
    none = Candidates(
        torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
    )
    logits = torch.zeros(0, 5, dtype=dtype, requires_grad=True)
    loss = dist_ppo_loss(logits, none, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)
    # a row without candidates is not read
    rows = torch.full((3, 70), math.nan, dtype=dtype, requires_grad=True)
    empty = none._replace(offsets=torch.zeros(4, dtype=torch.int64))
    loss = dist_ppo_loss(rows, empty, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert rows.grad is not None
    assert (rows.grad == 0).all()
    with poison():
        loss, grad = dist_ppo_loss_and_grad(rows, empty, backend=backend)
    assert loss.item() == 0
    assert (grad == 0).all()
    hidden, weight = torch.randn(3, 4).to(dtype).requires_grad_(), torch.randn(70, 4).to(dtype).requires_grad_()
    loss = linear_dist_ppo_loss(hidden, weight, empty, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    assert linear_dist_ppo_loss(hidden[:0], weight, none, backend=backend).item() == 0


def single(token: int, policy_logp: float, advantage: float) -> Candidates:
    return Candidates(
        torch.tensor([0, 1]), torch.tensor([token]), torch.tensor([policy_logp]), torch.tensor([advantage])
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, :4200] = -math.inf  # whole chunks of them, at the beginning
    logits[0, 4300:4400] = torch.finfo(dtype).min
    for token in (4250, 3):  # rho = 0 for the second one
        for advantage in (1.0, -1.0):
            candidates = single(token, -7.0, advantage)
            loss, grad = truth(logits, candidates)
            found, gradient = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
            assert float(found) == pytest.approx(float(loss), rel=1e-5, abs=1e-12)
            assert_gradient(gradient, torch.nan_to_num(grad, nan=0.0))
            assert (gradient[0, :4200] == 0).all()
            assert (gradient[0, 4300:4400] == 0).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0, 1e4, -1e4, 1e6])
def test_logits_far_from_zero(backend: str, dtype: torch.dtype, offset: float) -> None:
    logits, candidates = inputs(5, 4500, torch.float64)
    logits = (logits + offset).to(dtype)
    logits[0, 4000:] += 700  # a jump late in the row
    logits[1, :2100] += 30
    loss, grad = truth(logits, candidates)
    found, gradient = dist_ppo_loss_and_grad(logits, candidates, backend=backend)
    assert float(found) == pytest.approx(float(loss), rel=3e-6, abs=1e-9)
    assert_gradient(gradient, grad, slack=1e-14 + 1e-15 * abs(offset))


@each_backend
def test_huge_ratios_stay_finite(backend: str) -> None:
    for policy_logp in (-90.0, -800.0, -1e30):
        for dtype in (torch.float32, torch.float64):
            logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype)
            p = float(logits.double().softmax(1)[0, 2])
            shut = single(2, policy_logp, 3.0)
            loss, grad = dist_ppo_loss_and_grad(logits, shut, backend=backend)
            assert float(loss) == pytest.approx(0, abs=1e-38)
            assert (grad == 0).all()
            loss, grad = dist_ppo_loss_and_grad(logits, single(2, policy_logp, -3.0), backend=backend)
            assert float(loss) == pytest.approx(3 * p, rel=1e-6)  # pi_old * rho = pi_theta
            assert grad[0, 2].item() == pytest.approx(3 * p * (1 - p), rel=1e-6)
            loss, grad = dist_ppo_loss_and_grad(logits, single(2, policy_logp, -3.0), dual_clip=3, backend=backend)
            assert float(loss) == pytest.approx(0, abs=1e-37)
            assert (grad == 0).all()
    impossible = single(2, -math.inf, math.inf)
    loss, grad = dist_ppo_loss_and_grad(torch.zeros(1, 3), impossible, backend=backend)
    assert loss.item() == 0
    assert (grad == 0).all()


@each_backend
def test_more_than_two_to_the_31_logits(backend: str) -> None:
    if interpreted(backend):
        pytest.skip("70,000 programs take minutes in the interpreter")
    rows, columns = 70_000, 32_768
    assert rows * columns > 2**31
    row = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
    old = make_candidates(row, p_min=3e-4)
    ids, logp = old.token_ids[:2], old.policy_logp[:2]
    taking_part = [0, 1, 65_535, 65_536, rows - 1]
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[torch.tensor(taking_part) + 1] = 2
    candidates = Candidates(offsets.cumsum(0), ids.repeat(5), logp.repeat(5), torch.arange(1.0, 11.0))
    weight = torch.zeros(rows)
    weight[torch.tensor(taking_part)] = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4])
    found = dist_ppo_loss(row.expand(rows, columns), candidates, row_weight=weight, backend=backend)
    expected = -(weight[entry_rows(candidates)].double() * candidates.policy_logp.exp() * candidates.advantage).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@each_backend
def test_denormals_of_the_caller_survive(backend: str) -> None:
    logits, candidates = inputs(3, 100, torch.float32)
    dist_ppo_loss_and_grad(logits * 60, candidates, backend=backend)
    assert (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item() > 0
