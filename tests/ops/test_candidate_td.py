"""Room candidate_td: every backend against float64, edges, laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.kernels.candidate_td import reference
from prmfast.ops import Candidates
from prmfast.testing import make_inputs, poison
from tests.ops.device import (
    GPU,
    GPU_BACKENDS,
    backends,
    candidate_td,
    linear_candidate_td,
    token_logprob,
)

BACKENDS = backends("candidate_td")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4099]
INF, NAN = math.inf, math.nan
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def interpreted(backend: str) -> bool:
    """A row costs some 0.1 s there: such a backend gets fewer of them."""
    return backend == "triton" and not GPU


def each(name: str, values: Sequence[Any], few: Sequence[Any]) -> pytest.MarkDecorator:
    """Every backend with every one of ``values``, or of ``few`` where it is interpreted."""
    cases = [(b, value) for b in BACKENDS for value in (few if interpreted(b) else values)]
    return pytest.mark.parametrize(("backend", name), cases, ids=str)


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in GPU_BACKENDS else "cpu"


def logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = make_inputs("candidate_td", rows, columns, dtype=dtype, seed=seed)
    return made["policy_logits"], made["reward_logits"], made["sampled"]  # type: ignore[return-value]


def linear_inputs(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(rows + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "policy_hidden": normal(rows, 24),
        "reward_hidden": normal(rows, 33),
        "policy_weight": normal(columns, 24),
        "reward_weight": normal(columns, 33),
        "sampled": torch.randint(0, columns, (rows,), generator=g),
    }


def log_softmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(x.double() / temperature, 1)


def row_of(found: Candidates) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(found.offsets) - 1), found.offsets.diff())


def check(
    found: Candidates,
    policy: Tensor,
    reward: Tensor,
    *,
    p_min: float,
    beta: float = 10.0,
    sampled: Tensor | None = None,
) -> None:
    """Against log-probabilities of both sides, [T, V] in float64; within 1e-6 of the threshold either way is right."""
    rows, columns = policy.shape
    row = row_of(found)
    assert found.offsets.dtype == found.token_ids.dtype == torch.int64
    assert found.offsets.shape == (rows + 1,)
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.token_ids) == len(found.policy_logp) == len(found.advantage)
    assert (torch.diff(row * columns + found.token_ids) > 0).all()
    margin = policy - (math.log(p_min) - reference.TOUCH)
    wanted, clear = margin >= 0, margin.abs() > 1e-6
    if sampled is not None:
        wanted = wanted.scatter(1, sampled[:, None], True)
        clear = clear.scatter(1, sampled[:, None], True)
    got = torch.zeros_like(wanted)
    got[row, found.token_ids] = True
    assert torch.equal(got & clear, wanted & clear)
    logp, logq = policy[row, found.token_ids], reward[row, found.token_ids]
    expected = beta * torch.where(logp == logq, 0.0, logq - logp)
    exact = found.policy_logp.dtype == torch.float64
    for name, x, y, scale in (("logp", found.policy_logp, logp, 1.0), ("advantage", found.advantage, expected, beta)):
        y = y.to(x.dtype).double()  # as large as the output can hold
        tolerance = (1e-12 if exact else 2e-6) * (scale + y.abs())
        close = (x.double() == y) | ((x.double() - y).abs() <= tolerance)
        assert close.all(), (name, x[~close][:3], y[~close][:3])


@each("columns", WIDTHS, [1, 17, 8193])
@each_dtype
def test_against_float64(backend: str, dtype: torch.dtype, columns: int) -> None:
    p, q, sampled = logits(1 if interpreted(backend) else 12, columns, dtype, seed=columns)
    for options in ({}, {"p_min": 1e-3}, {"p_min": 1e-4, "beta": 0.5}, {"p_min": 1.0}, {"p_min": 0.5}):
        found = candidate_td(p, q, **options, backend=backend)
        assert found.advantage.dtype == found.policy_logp.dtype == reference.output_dtype(p)
        check(found, log_softmax(p), log_softmax(q), p_min=0.1) if not options else check(
            found, log_softmax(p), log_softmax(q), **options
        )
    found = candidate_td(
        p, q, sampled=sampled, policy_temperature=0.6, reward_temperature=2.5, p_min=0.05, backend=backend
    )
    check(found, log_softmax(p, 0.6), log_softmax(q, 2.5), p_min=0.05, sampled=sampled)


@each_backend
def test_two_dtypes(backend: str) -> None:
    p, q, sampled = logits(5, 100)
    for a, b in ((p.bfloat16(), q), (p, q.half()), (p.half(), q.double())):
        found = candidate_td(a, b, sampled=sampled, backend=backend)
        check(found, log_softmax(a), log_softmax(b), p_min=0.1, sampled=sampled)


@each_backend
@each_dtype
def test_no_rows(backend: str, dtype: torch.dtype) -> None:
    empty = torch.empty(0, 7, dtype=dtype)
    found = candidate_td(empty, empty, sampled=torch.empty(0, dtype=torch.int64), backend=backend)
    assert found.offsets.tolist() == [0]
    assert found.token_ids.shape == found.policy_logp.shape == found.advantage.shape == (0,)
    assert token_logprob(empty, torch.empty(0, dtype=torch.int64), backend=backend).shape == (0,)


@each_backend
@each_dtype
def test_one_token(backend: str, dtype: torch.dtype) -> None:
    one = torch.tensor([[3.0], [-9.0]], dtype=dtype)
    found = candidate_td(one, -one, p_min=1.0, backend=backend)
    assert found.offsets.tolist() == [0, 1, 2]
    assert found.policy_logp.tolist() == pytest.approx([0, 0], abs=2e-7)
    assert found.advantage.tolist() == pytest.approx([0, 0], abs=2e-6)


@each("size", [1, 2, 3, 7, 10, 49, 100, 1000, 10_000], [1, 10, 3000])
@each_dtype
def test_equal_logits_touch_p_min(backend: str, dtype: torch.dtype, size: int) -> None:
    """V equal logits have probability 1 / V exactly: all are candidates, whatever 1 / V is in binary."""
    for value in (5.5,) if interpreted(backend) else (0.0, 5.5, -3.25):
        x = torch.full((2, size), value, dtype=dtype)
        found = candidate_td(x, x, p_min=1 / size, backend=backend)
        assert found.offsets.tolist() == [0, size, 2 * size]
        assert found.token_ids.tolist() == 2 * list(range(size))
        assert found.advantage.tolist() == 2 * size * [0.0]
        if size > 1:
            assert len(candidate_td(x, x, p_min=1.001 / size, backend=backend).token_ids) == 0


@each_backend
@each_dtype
def test_ties_and_masked_tokens(backend: str, dtype: torch.dtype) -> None:
    p = torch.full((4, 5000), -INF, dtype=dtype)
    p[0, [7, 4999]] = 2.0  # a tie across chunks, -inf before, between and nothing behind
    p[1, 4998] = -3.0  # all but one
    p[2, [0, 1, 2, 2048]] = 1.0
    p[3] = -50.0  # many small, and one that arrives late
    p[3, 4000] = 1.0
    q = torch.zeros(4, 5000, dtype=dtype)
    q[1, :4998] = -INF
    q[2, 2048] = -INF
    found = candidate_td(p, q, backend=backend)
    assert found.offsets.tolist() == [0, 2, 3, 7, 8]
    assert found.token_ids.tolist() == [7, 4999, 4998, 0, 1, 2, 2048, 4000]
    assert found.advantage[6] == -INF
    check(found, log_softmax(p), log_softmax(q), p_min=0.1)


@each_backend
@each_dtype
def test_sampled_token_joins(backend: str, dtype: torch.dtype) -> None:
    p = torch.tensor([[0.0, 5.0, 1.0, -INF], [0.0, 5.0, 1.0, -INF], [0.0, 5.0, 5.0, -INF], [5.0, 0.0, 0.0, -INF]])
    q = torch.tensor([[0.0, 1.0, 2.0, -INF], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, -INF, 0.0]])
    p, q, sampled = p.to(dtype), q.to(dtype), torch.tensor([3, 3, 1, 2])
    found = candidate_td(p, q, sampled=sampled, backend=backend)
    assert found.offsets.tolist() == [0, 2, 4, 6, 8]
    assert found.token_ids.tolist() == [1, 3, 1, 3, 1, 2, 0, 2]
    assert found.policy_logp[[1, 3]].tolist() == [-INF, -INF]
    assert found.advantage[[1, 3, 7]].tolist() == [0.0, INF, -INF]  # p = 0 on both sides, on the policy's, on the other
    check(found, log_softmax(p), log_softmax(q), p_min=0.1, sampled=sampled)


@each_backend
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_monster_logits(backend: str, size: float) -> None:
    g = torch.Generator().manual_seed(1)
    p = torch.randn(6, 3000, generator=g).clamp(-1, 1) * size
    p[1] = -size
    p[2] = size
    p[3, 1:] = -size
    p[4] = torch.where(torch.arange(3000) % 2 == 0, size, -size)
    p[5] = torch.linspace(-1, 1, 3000) * size
    for temperature in (0.37,) if interpreted(backend) else (1.0, 0.37, 1e4):
        found = candidate_td(p, p.flip(0), p_min=1e-4, policy_temperature=temperature, backend=backend)
        check(found, log_softmax(p, temperature), log_softmax(p.flip(0)), p_min=1e-4)
    ids = torch.tensor([3, 4, 5, 0, 7, 2999])
    close_to_log_softmax(p, ids, backend)


def close_to_log_softmax(x: Tensor, ids: Tensor, backend: str, temperature: float = 1.0) -> None:
    """Value and gradient of token_logprob against float64."""
    x = x.detach().requires_grad_()
    truth = log_softmax(x.detach(), temperature).gather(1, ids[:, None])[:, 0]
    weight = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    value = token_logprob(x, ids, temperature=temperature, backend=backend)
    exact = x.dtype == torch.float64
    assert value.dtype == reference.output_dtype(x)
    close = (value.double() - truth).abs() <= (1e-12 if exact else 1e-6) * (1 + truth.abs())
    assert (close | (value.double() == truth) | (truth.float() == value)).all()
    (grad,) = torch.autograd.grad((weight.to(value.dtype) * value)[value.isfinite()].sum(), x)
    assert grad.dtype == x.dtype
    hot = torch.nn.functional.one_hot(ids, x.shape[1]).double()
    expected = (weight * value.isfinite())[:, None] * (hot - log_softmax(x.detach(), temperature).exp()) / temperature
    epsilon = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[x.dtype]
    error = (grad.double() - expected).abs()
    floor = 1e-13 if exact else 1e-6 / temperature  # of 1 - p where p is nearly 1
    assert (error <= epsilon * expected.abs() + floor * hot + (1e-7 if x.dtype == torch.float16 else 1e-14)).all()


@each("columns", [1, 17, 2049, 4099], [1, 17, 8193])
@each_dtype
def test_token_logprob(backend: str, dtype: torch.dtype, columns: int) -> None:
    p, q, sampled = logits(2 if interpreted(backend) else 9, columns, dtype, seed=columns)
    close_to_log_softmax(q, sampled, backend)
    close_to_log_softmax(p, sampled, backend, temperature=0.7)
    close_to_log_softmax(q[::2, : max(1, columns // 2)], sampled[::2] % max(1, columns // 2), backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 130), (torch.bfloat16, 260)], ids=str)
def test_large_gradients_go_past_the_cache_and_hold_nothing_else(backend: str, dtype: torch.dtype, rows: int) -> None:
    """Beyond 4 MiB with rows at every alignment; outputs start as NaN; rows of weight 0 are zeros."""
    rows = 8 if interpreted(backend) else rows
    _, q, sampled = logits(rows, 8191, dtype)
    x = q.requires_grad_()
    weight = torch.ones(rows)
    weight[::3] = 0
    with poison():
        value = token_logprob(x, sampled, backend=backend)
        (grad,) = torch.autograd.grad((weight * value).sum(), x)
    assert (grad[::3] == 0).all()
    some = [1, 2, 7, rows - 2 - (rows - 2) % 3 + 1]
    y = q.detach()[some].requires_grad_()
    (small,) = torch.autograd.grad(token_logprob(y, sampled[some], backend=backend).sum(), y)
    assert torch.equal(grad[some], small)  # a small gradient is stored through the cache
    assert grad.double().sum(1).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)


@each_backend
def test_poisoned_outputs(backend: str) -> None:
    p, q, sampled = logits(4 if interpreted(backend) else 40, 333)
    with poison():
        found = candidate_td(p, q, sampled=sampled, backend=backend)
    check(found, log_softmax(p), log_softmax(q), p_min=0.1, sampled=sampled)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 7),
    columns=st.integers(1, 300),
    p_min=st.floats(1e-4, 1.0),
    temperature=st.floats(0.2, 4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "rows", "columns", "transposed", "expanded"]),
    forced=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_dtype_and_layout(
    rows: int, columns: int, p_min: float, temperature: float, dtype: torch.dtype, layout: str, forced: bool, seed: int
) -> None:
    def view(base: Tensor) -> Tensor:
        if layout == "rows":
            return base[::2, :columns]
        if layout == "columns":
            return torch.where(base[:rows, ::2] == -INF, base.new_tensor(-9.0), base[:rows, ::2])
        if layout == "transposed":
            return base[:rows, :columns].t().contiguous().t()
        if layout == "expanded":
            return base[:1, :columns].expand(min(rows, 1) * rows, columns)
        return base[:rows, :columns].contiguous()

    p, q, ids = logits(max(1, 2 * rows), 2 * columns, dtype, seed)
    p, q = view(p), view(q)
    sampled = (ids[: len(p)] % columns) if forced else None
    for backend in BACKENDS:
        if interpreted(backend) and rows > 2:
            continue
        found = candidate_td(p, q, p_min=p_min, sampled=sampled, policy_temperature=temperature, backend=backend)
        check(found, log_softmax(p, temperature), log_softmax(q), p_min=p_min, sampled=sampled)
        close_to_log_softmax(q, ids[: len(q)] % columns, backend, temperature)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_more_than_2_31_elements(backend: str) -> None:
    """One row 2^15 + 5 times, without memory: stride 0."""
    if interpreted(backend):
        pytest.skip("300,000 programs in the interpreter: test_rows_far_apart has its addresses")
    p, q, sampled = logits(1, 65_543, torch.bfloat16)
    rows = 2**15 + 5
    many = p.expand(rows, -1)
    assert many.numel() > 2**31
    one = candidate_td(p, q, p_min=0.02, sampled=sampled, backend=backend)
    found = candidate_td(many, q.expand(rows, -1), p_min=0.02, sampled=sampled.expand(rows), backend=backend)
    size = len(one.token_ids)
    check(one, log_softmax(p), log_softmax(q), p_min=0.02, sampled=sampled)
    assert torch.equal(found.offsets, size * torch.arange(rows + 1))
    for name in ("token_ids", "policy_logp", "advantage"):
        assert torch.equal(getattr(found, name), getattr(one, name).repeat(rows))


@each_backend
def test_more_columns_than_one_look_takes(backend: str) -> None:
    """A GPU backend looks at 64 slices and 256 chunks of a row at a time: here are 65 and 518."""
    p, q = torch.full((1, 530_000), -9.0), torch.zeros(1, 530_000)
    p[0, [3, 262_143, 262_144, 300_000, 529_999]] = torch.tensor([5.0, 5.5, 6.0, 3.0, 6.5])
    q[0, 524_288:] = 9.0
    sampled = torch.tensor([400_000])
    found = candidate_td(p, q, p_min=0.05, sampled=sampled, backend=backend)
    assert found.token_ids.tolist() == [3, 262_143, 262_144, 400_000, 529_999]
    check(found, log_softmax(p), log_softmax(q), p_min=0.05, sampled=sampled)
    close_to_log_softmax(q, sampled, backend)


@each_backend
def test_rows_far_apart(backend: str) -> None:
    """Row 1 begins 2^31 elements behind row 0, in memory that is never touched but for the two rows."""
    base = torch.empty(2**31 + 300, dtype=torch.bfloat16)
    far = base.as_strided((2, 300), (2**31, 1))
    p, q, sampled = logits(2, 300, torch.bfloat16)
    far.copy_(p)
    found = candidate_td(far, q, p_min=0.02, sampled=sampled, backend=backend)
    check(found, log_softmax(p), log_softmax(q), p_min=0.02, sampled=sampled)
    found = candidate_td(q, far, p_min=0.02, backend=backend)
    check(found, log_softmax(q), log_softmax(p), p_min=0.02)
    close_to_log_softmax(far, sampled, backend)


@each_backend
@each_dtype
def test_row_alone_equals_row_in_batch_bitwise(backend: str, dtype: torch.dtype) -> None:
    size = 2 if interpreted(backend) else 9
    p, q, sampled = logits(size, 8199, dtype)
    together = candidate_td(p, q, sampled=sampled, p_min=0.01, backend=backend)
    values = token_logprob(p, sampled, backend=backend)
    for t in range(size):
        alone = candidate_td(p[t : t + 1], q[t : t + 1], sampled=sampled[t : t + 1], p_min=0.01, backend=backend)
        part = slice(int(together.offsets[t]), int(together.offsets[t + 1]))
        assert all(torch.equal(a, b[part]) for a, b in zip(alone[1:], together[1:], strict=True))
        assert torch.equal(token_logprob(p[t : t + 1], sampled[t : t + 1], backend=backend), values[t : t + 1])


@each_backend
def test_threads_change_nothing(backend: str) -> None:
    if backend in GPU_BACKENDS:
        pytest.skip("threads are the CPU's")
    p, q, sampled = logits(67, 8191)
    h, w = torch.randn(67, 16), torch.randn(5000, 16)

    def run() -> list[Tensor]:
        x = q.clone().requires_grad_()
        value = token_logprob(x, sampled, backend=backend)
        (grad,) = torch.autograd.grad(value.sum(), x)
        found = candidate_td(p, q, sampled=sampled, p_min=0.01, backend=backend)
        return [*found, value.detach(), grad]

    def run_linear() -> Candidates:
        return linear_candidate_td(h, h, policy_weight=w, reward_weight=w, backend=backend)

    one, one_linear = run(), run_linear()
    torch.set_num_threads(3)
    try:
        three, three_linear = run(), run_linear()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert torch.equal(one_linear.token_ids, three_linear.token_ids)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_laws(backend: str, dtype: torch.dtype) -> None:
    rows = 1 if interpreted(backend) else 60
    p, q, _ = logits(rows, 2500, dtype)
    previous: set[tuple[int, int]] = set()
    for p_min in (1.0, 0.5, 0.1, 0.01, 1e-3, 1e-4):
        found = candidate_td(p, q, p_min=p_min, backend=backend)
        pairs = set(zip(row_of(found).tolist(), found.token_ids.tolist(), strict=True))
        assert previous <= pairs
        previous = pairs
        assert int(found.offsets.diff().max()) <= int(1 / (p_min * (1 - reference.TOUCH)))
        mass = torch.zeros(rows, dtype=torch.float64).index_add(0, row_of(found), found.policy_logp.double().exp())
        assert mass.max() <= 1 + 1e-6
        assert (found.policy_logp <= 0).all()
    same = candidate_td(p, p, p_min=1e-3, backend=backend)
    assert len(same.advantage) > rows
    assert (same.advantage == 0).all()
    shifted = candidate_td(p.float() + 3, q.float() - 5, p_min=1e-3, backend=backend)
    assert torch.equal(shifted.token_ids, same.token_ids)
    twice = candidate_td(p, q, beta=20.0, backend=backend)
    torch.testing.assert_close(twice.advantage, 2 * candidate_td(p, q, backend=backend).advantage)


@each_backend
def test_denormals_of_the_caller_survive(backend: str) -> None:
    p, q, sampled = logits(1 if interpreted(backend) else 50, 3000)
    candidate_td(p, q, backend=backend)
    token_logprob(q, sampled, backend=backend)
    assert (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item() > 0
