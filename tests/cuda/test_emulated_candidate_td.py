"""Room candidate_td's CUDA kernels and their adapter, emulated, against the reference."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast.kernels.candidate_td import reference
from prmfast.testing import make_inputs
from tests.cuda.adapters import adapter, guarded, guarded_copy
from tests.cuda.library import Library, build
from tests.ops.test_candidate_td import check, log_softmax

pytestmark = pytest.mark.xdist_group("emulated_candidate_td")  # the library is compiled once
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPTIONS = {"p_min": 0.1, "beta": 10.0, "sampled": None, "policy_temperature": 1.0, "reward_temperature": 1.0}


@pytest.fixture(scope="module")
def library() -> Library:
    return build("candidate_td", "csrc/candidate_td/candidate_td_cuda.cu", "tests/cuda/candidate_td_shim.cpp")


@pytest.fixture
def cuda(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    library.on(90)
    module = adapter(library, "candidate_td", SLOTS=16)
    monkeypatch.setattr(torch, "empty", functools.partial(guarded, library))
    return module


def inputs(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = make_inputs("candidate_td", rows, columns, dtype=dtype, seed=seed)
    return made["policy_logits"], made["reward_logits"], made["sampled"]  # type: ignore[return-value]


def run(cuda: ModuleType, library: Library, p: Tensor, q: Tensor, shift: int = 0, **options: Any) -> Any:
    """On guarded copies; checked against float64."""
    chosen = OPTIONS | options
    found = cuda.candidate_td(guarded_copy(library, p, shift), guarded_copy(library, q, shift), **chosen)
    truth = [log_softmax(x, chosen[f"{name}_temperature"]) for x, name in ((p, "policy"), (q, "reward"))]
    check(found, *truth, p_min=chosen["p_min"], beta=chosen["beta"], sampled=chosen["sampled"])
    return found


@each_dtype
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 63, 2047, 2048, 2049, 4099])
def test_against_float64(cuda: ModuleType, library: Library, dtype: torch.dtype, columns: int) -> None:
    p, q, sampled = inputs(5, columns, dtype, seed=columns)
    for options in ({}, {"p_min": 1.0}, {"p_min": 0.5, "beta": 0.5}, {"p_min": 1 / 15, "sampled": sampled}):
        run(cuda, library, p, q, **options)
    run(cuda, library, p, q, sampled=sampled, policy_temperature=0.6, reward_temperature=2.5)


def test_no_rows_launch_nothing(cuda: ModuleType, library: Library) -> None:
    empty = torch.zeros(0, 7)
    assert run(cuda, library, empty, empty).offsets.tolist() == [0]
    ids = torch.zeros(0, dtype=torch.int64)
    logp, norm = cuda.token_logprob(empty, ids, temperature=1.0)
    assert logp.shape == (0,)
    assert cuda.token_logprob_backward(logp, empty, ids, norm, temperature=1.0).shape == (0, 7)
    assert library.launches == []


def test_two_dtypes(cuda: ModuleType, library: Library) -> None:
    p, q, sampled = inputs(4, 100, torch.float32)
    for a, b in ((p.bfloat16(), q), (p, q.half()), (p.half(), q.bfloat16())):
        run(cuda, library, a, b, sampled=sampled)


@each_dtype
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_misaligned_rows_give_the_same_bits(cuda: ModuleType, library: Library, dtype: torch.dtype, shift: int) -> None:
    p, q, sampled = inputs(4, 4001, dtype)  # odd: every row has an alignment of its own
    straight, shifted = (run(cuda, library, p, q, shift=s, sampled=sampled) for s in (0, shift))
    assert all(torch.equal(a, b) for a, b in zip(straight, shifted, strict=True))
    for row in range(4):
        alone = run(cuda, library, p[row : row + 1], q[row : row + 1], sampled=sampled[row : row + 1])
        begin, end = straight.offsets[row : row + 2].tolist()
        assert all(torch.equal(a[begin:end], b) for a, b in zip(straight[1:], alone[1:], strict=True))


@each_dtype
def test_strided_and_expanded_rows(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    p, q, _ = inputs(6, 300, dtype)
    for view in (lambda x: x[::2, 5:200], lambda x: x[:3, ::2], lambda x: x[:1].expand(3, 300), lambda x: x.t()[:7]):
        a, b = view(p), view(q)
        a, b = (x.masked_fill(x.isinf().all(1, keepdim=True), 0.0) if x.isinf().all(1).any() else x for x in (a, b))
        check(cuda.candidate_td(a, b, **OPTIONS), log_softmax(a), log_softmax(b), p_min=0.1)


@each_dtype
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 15])
def test_equal_logits_touch_p_min(cuda: ModuleType, library: Library, dtype: torch.dtype, size: int) -> None:
    for value in (0.0, 5.5, -3.25):
        x = torch.full((2, size), value, dtype=dtype)
        found = run(cuda, library, x, x, p_min=1 / size)
        assert found.offsets.tolist() == [0, size, 2 * size]
        assert found.advantage.tolist() == 2 * size * [0.0]
        if size > 1:
            assert len(run(cuda, library, x, x, p_min=1.001 / size).token_ids) == 0


def test_a_hair_below_p_min_counts(cuda: ModuleType, library: Library) -> None:
    """Rows of p = 0.1 (1 - 5e-6), which rounding may have made of 0.1, and of 0.1 (1 - 2e-5)."""
    p = torch.tensor([0.1 * (1 - 5e-6), 0.1 * (1 - 2e-5)], dtype=torch.float64)
    x = torch.stack([torch.zeros(2, dtype=torch.float64), (p / (1 - p)).log()], 1).float()
    assert run(cuda, library, x, x).offsets.tolist() == [0, 2, 3]


@each_dtype
def test_fifteen_candidates_and_one_forced_fill_the_slots(
    cuda: ModuleType, library: Library, dtype: torch.dtype
) -> None:
    x = torch.full((3, 6000), -60.0, dtype=dtype)
    x[:, :6000:400] = 2.0  # 15 of them
    sampled = torch.tensor([5999, 0, 1])
    found = run(cuda, library, x, x.flip(1), p_min=1 / 15, sampled=sampled)
    assert found.offsets.tolist() == [0, 16, 31, 47]
    assert len(run(cuda, library, x, x.flip(1), p_min=1 / 14.99).token_ids) == 0


@each_dtype
def test_ties_and_masked_tokens(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    p = torch.full((4, 5000), -INF, dtype=dtype)
    p[0, [7, 4999]] = 2.0  # a tie across segments, -inf before, between and nothing behind
    p[1, 4998] = -3.0
    p[2, [0, 1, 2, 2048]] = 1.0
    p[3] = -50.0
    p[3, 4000] = 1.0
    q = torch.zeros(4, 5000, dtype=dtype)
    q[1, :4998] = -INF
    q[2, 2048] = -INF
    found = run(cuda, library, p, q)
    assert found.offsets.tolist() == [0, 2, 3, 7, 8]
    assert found.token_ids.tolist() == [7, 4999, 4998, 0, 1, 2, 2048, 4000]
    assert found.advantage[6] == -INF


@each_dtype
def test_a_forced_token_of_probability_zero(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    p = torch.tensor([[0.0, 5.0, 1.0, -INF], [0.0, 5.0, 1.0, -INF], [0.0, 5.0, 5.0, -INF], [5.0, 0.0, 0.0, -INF]])
    q = torch.tensor([[0.0, 1.0, 2.0, -INF], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, -INF, 0.0]])
    found = run(cuda, library, p.to(dtype), q.to(dtype), sampled=torch.tensor([3, 3, 1, 2]))
    assert found.token_ids.tolist() == [1, 3, 1, 3, 1, 2, 0, 2]
    assert found.policy_logp[[1, 3]].tolist() == [-INF, -INF]
    assert found.advantage[[1, 3, 7]].tolist() == [0.0, INF, -INF]


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_monster_logits(cuda: ModuleType, library: Library, size: float) -> None:
    g = torch.Generator().manual_seed(1)
    p = torch.randn(6, 3000, generator=g).clamp(-1, 1) * size
    p[1] = -size
    p[2, 5:] = -size
    p[3, 1:] = -size
    p[4] = torch.where(torch.arange(3000) % 600 == 0, size, -size)
    p[5] = torch.linspace(-1, 1, 3000) * size
    for temperature in (1.0, 0.37, 1e4):
        run(cuda, library, p, p.flip(0), p_min=1 / 15, policy_temperature=temperature)
    close_to_log_softmax(cuda, p, torch.tensor([3, 4, 5, 0, 7, 2999]))


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(cuda: ModuleType, library: Library, temperature: float) -> None:
    x = torch.full((2, 5000), -INF)
    x[:, 4000:4007] = torch.tensor([1.0, 2.0, 2.0, -1.0, 0.0, 2.0, 1.0])
    found = run(cuda, library, x, x, policy_temperature=temperature)
    assert len(found.token_ids) == (14 if temperature > 1 else 6)


@each_dtype
@pytest.mark.parametrize(("value", "kind"), [(NAN, "NaN"), (INF, r"\+inf"), (-INF, "only -inf")])
@pytest.mark.parametrize("column", [0, 2100, 4098])
def test_rows_without_a_softmax(
    cuda: ModuleType, library: Library, dtype: torch.dtype, value: float, kind: str, column: int
) -> None:
    good = torch.zeros(6, 4099, dtype=dtype)
    bad = good.clone()
    for row in (2, 4):
        bad[row, column if kind != "only -inf" else slice(None)] = value
    rule = r"must hold no NaN, no \+inf and a value above -inf in every row, got"
    with pytest.raises(ValueError, match=rf"candidate_td: policy_logits {rule} {kind} in row 2"):
        cuda.candidate_td(bad, good, **OPTIONS)
    with pytest.raises(ValueError, match=rf"candidate_td: reward_logits {rule} {kind} in row 2"):
        cuda.candidate_td(torch.cat([good[:4], bad[4:]]), bad, **OPTIONS)
    with pytest.raises(ValueError, match=rf"token_logprob: logits {rule} {kind} in row 2"):
        cuda.token_logprob(bad, torch.zeros(6, dtype=torch.int64), temperature=1.0)
    if kind == "NaN":  # among masked tokens, beside +inf, and with a payload of its own
        bad[2] = -INF
        bad[2, column] = value
        bad[2, 7] = INF
        if dtype == torch.float32:
            bad.view(torch.int32)[2, column] = 0x7F800001
        with pytest.raises(ValueError, match="got NaN in row 2"):
            cuda.candidate_td(bad, good, **OPTIONS)


def test_the_order_of_threads_changes_nothing_and_the_logits_are_read_once(cuda: ModuleType, library: Library) -> None:
    p, q, sampled = inputs(3, 8192, torch.bfloat16)
    p, q = guarded_copy(library, p), guarded_copy(library, q)
    slots = []
    for backwards in (False, True):
        library.on(80, backwards=backwards)
        slots.append(cuda.padded(p, q, **OPTIONS | {"sampled": sampled}))
        again = sum(1 + int(c) for c in slots[-1].counts)  # a segment per candidate at the most
        whole = 2 * p.numel() * p.element_size()
        assert whole < library.bytes_read <= whole + again * 4096
        assert len(library.launches) == 3
    assert all(torch.equal(a, b) for a, b in zip(*slots, strict=True))
    unused = torch.arange(16) >= slots[0].counts[:, None]
    assert (slots[0].token_ids[unused] == -1).all()
    assert (slots[0].policy_logp[unused] == -INF).all()


def close_to_log_softmax(cuda: ModuleType, x: Tensor, ids: Tensor, temperature: float = 1.0) -> None:
    """Value and gradient of token_logprob against float64, as tests/ops holds every backend to."""
    truth = log_softmax(x, temperature).gather(1, ids[:, None])[:, 0]
    value, norm = cuda.token_logprob(x, ids, temperature=temperature)
    assert value.dtype == torch.float32
    close = (value.double() - truth).abs() <= 1e-6 * (1 + truth.abs())
    assert (close | (value.double() == truth) | (truth.float() == value)).all()
    weight = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    weight = torch.where(value.isfinite(), weight, 0.0)
    grad = cuda.token_logprob_backward(weight, x, ids, norm, temperature=temperature)
    assert grad.dtype == x.dtype
    hot = torch.nn.functional.one_hot(ids, x.shape[1]).double()
    expected = weight[:, None] * (hot - log_softmax(x, temperature).exp()) / temperature
    epsilon = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[x.dtype]
    error = (grad.double() - expected).abs()
    floor = 1e-6 / temperature  # of 1 - p where p is nearly 1
    assert (error <= epsilon * expected.abs() + floor * hot + (1e-7 if x.dtype == torch.float16 else 1e-14)).all()


@each_dtype
@pytest.mark.parametrize("columns", [1, 17, 2049, 4099])
def test_token_logprob(cuda: ModuleType, library: Library, dtype: torch.dtype, columns: int) -> None:
    p, q, sampled = inputs(5, columns, dtype, seed=columns)
    close_to_log_softmax(cuda, guarded_copy(library, q), sampled)
    close_to_log_softmax(cuda, guarded_copy(library, p, 1), sampled, temperature=0.7)
    few = max(1, columns // 2)
    close_to_log_softmax(cuda, q[::2, :few], sampled[::2] % few)


def test_rows_of_weight_zero_are_zeros_and_rows_alone_have_the_same_bits(cuda: ModuleType, library: Library) -> None:
    _, q, sampled = inputs(4, 2500, torch.float32)
    value, norm = cuda.token_logprob(q, sampled, temperature=1.0)
    norm[0] = NAN
    weight = torch.tensor([0.0, 1.0, -2.0, 0.5])
    grad = cuda.token_logprob_backward(weight, q, sampled, norm, temperature=1.0)
    assert (grad[0] == 0).all()
    one = slice(2, 3)
    assert torch.equal(cuda.token_logprob(q[one], sampled[one], temperature=1.0)[0], value[one])
    alone = cuda.token_logprob_backward(weight[one], q[one], sampled[one], norm[one], temperature=1.0)
    assert torch.equal(alone, grad[one])


def test_the_signatures_are_the_references(cuda: ModuleType) -> None:
    for name in ("candidate_td", "linear_candidate_td", "token_logprob", "token_logprob_backward"):
        assert (
            inspect.signature(getattr(cuda, name)).parameters == inspect.signature(getattr(reference, name)).parameters
        )
