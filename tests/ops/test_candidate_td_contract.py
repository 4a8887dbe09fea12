"""The contract of the room candidate_td: registration, gradients, torch.compile, errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prmfast import ops
from prmfast.kernels.candidate_td import reference
from prmfast.ops._backends import load
from tests.ops.device import GPU_BACKENDS, candidate_td, linear_candidate_td, moved, token_logprob
from tests.ops.test_candidate_td import (
    BACKENDS,
    INF,
    NAN,
    device_of,
    each,
    each_backend,
    each_dtype,
    interpreted,
    linear_inputs,
    logits,
)

# --- registration, compile


def test_gradcheck() -> None:
    _, q, sampled = logits(3, 6, torch.float64)
    for backend in BACKENDS:
        for temperature in (1.0, 0.6):
            run = lambda x, b=backend, c=temperature: token_logprob(x, sampled, temperature=c, backend=b)  # noqa: E731
            assert torch.autograd.gradcheck(run, (q.clone().requires_grad_(),))


def test_second_derivative_says_no() -> None:
    _, q, sampled = logits(2, 5)
    x = q.requires_grad_()
    (first,) = torch.autograd.grad(token_logprob(x, sampled).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="token_logprob is differentiable once"):
        first.sum().backward()


@each("dtype", [torch.float32, torch.float64, torch.bfloat16], [torch.float32])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    """All checks in float32; the schema and what the fakes say of shapes and dtypes in every dtype."""
    namespace = torch.ops.prmfast
    some = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_faketensor")}
    opcheck = functools.partial(torch.library.opcheck, **some)
    rows = 1 if interpreted(backend) else 5
    p, q, sampled = moved(logits(rows, 20, dtype), device_of(backend))
    for a, b, s in ((p, q, sampled), (p[::2, :9], q[::2, :9], None), (p[:0], q[:0], sampled[:0])):
        opcheck(namespace.candidate_td.default, (a, b, 0.1, 10.0, s, 1.0, 0.5, backend))
    made = {name: value.to(p.device) for name, value in linear_inputs(rows, 30, dtype).items()}
    sampled = made.pop("sampled")
    opcheck(namespace.linear_candidate_td.default, (*made.values(), 0.1, 10.0, sampled, 1.0, 0.5, backend))
    ids = torch.arange(rows, device=p.device)
    opcheck(namespace.token_logprob.default, (q.clone().requires_grad_(), ids, 0.5, backend))
    opcheck(namespace.token_logprob.default, (q[:, ::2], ids, 0.5, backend))
    _, norm = namespace.token_logprob(q, ids, 1.0, backend)
    ones = torch.ones(rows, dtype=torch.float32, device=p.device)
    opcheck(namespace.token_logprob_backward.default, (ones, q, ids, norm, 1.0, backend))


def every_op(p: Tensor, q: Tensor, hidden: Tensor, sampled: Tensor, backend: str) -> tuple[Tensor, ...]:
    p = p * 1.5
    found = ops.candidate_td(p, q, p_min=0.05, sampled=sampled, backend=backend)
    linear = ops.linear_candidate_td(hidden, hidden, policy_weight=hidden, reward_weight=hidden * 2, backend=backend)
    row = torch.repeat_interleave(torch.arange(len(q), device=q.device), found.offsets.diff())
    total = torch.zeros(len(q), device=q.device).index_add(0, row, found.advantage.exp())
    return *found, *linear, total, ops.token_logprob(q, sampled, temperature=0.8, backend=backend) + 1


@pytest.mark.parametrize("backend", ["auto", *(b for b in BACKENDS if b in GPU_BACKENDS)])
def test_compile_fullgraph(backend: str) -> None:
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    for rows in (2,) if interpreted(backend) else (6, 8):  # the second call recompiles with a dynamic batch
        p, q, sampled = moved(logits(rows, 50), device_of(backend))
        arguments = (p, q, torch.randn(rows, 4, device=p.device), sampled, backend)
        for got, expected in zip(compiled(*arguments), every_op(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
    x = q.clone().requires_grad_()
    value = functools.partial(ops.token_logprob, ids=sampled, backend=backend)
    (expected,) = torch.autograd.grad(value(x).sum(), x)
    total = torch.compile(lambda x: value(x).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(total(x), x)[0], expected)


def test_nothing_is_differentiated_through_candidates() -> None:
    p, q, _ = logits(3, 9)
    found = candidate_td(p.requires_grad_(), q.requires_grad_())
    assert not found.policy_logp.requires_grad
    assert not found.advantage.requires_grad


def test_every_backend_has_the_same_parameters() -> None:
    for name in ("candidate_td", "linear_candidate_td", "token_logprob", "token_logprob_backward"):
        wanted = inspect.signature(getattr(reference, name)).parameters
        for backend in BACKENDS:
            assert inspect.signature(getattr(load("candidate_td", backend), name)).parameters == wanted


# --- errors

OK = torch.zeros(3, 4)
IDS = torch.tensor([0, 1, 2])
WEIGHT = torch.zeros(4, 4)


@each("column", [0, 70, 2100, 4098], [2100])
@each_dtype
@pytest.mark.parametrize(("value", "kind"), [(NAN, "NaN"), (INF, r"\+inf"), (-INF, "only -inf")])
def test_rows_without_a_softmax(backend: str, dtype: torch.dtype, value: float, kind: str, column: int) -> None:
    first, second, rows = (1, 2, 3) if interpreted(backend) else (2, 4, 6)
    good = torch.zeros(rows, 4099, dtype=dtype)
    bad = good.clone()
    for row in (first, second):
        bad[row, column if kind != "only -inf" else slice(None)] = value
    rule = r"must hold no NaN, no \+inf and a value above -inf in every row, got"
    with pytest.raises(ValueError, match=rf"candidate_td: policy_logits {rule} {kind} in row {first}"):
        candidate_td(bad, good, backend=backend)
    with pytest.raises(ValueError, match=rf"candidate_td: reward_logits {rule} {kind} in row {first}"):
        candidate_td(good, bad, backend=backend)
    with pytest.raises(ValueError, match=rf"candidate_td: reward_logits {rule} {kind} in row {first}"):
        candidate_td(torch.cat([good[:second], bad[second:]]), bad, backend=backend)
    with pytest.raises(ValueError, match=rf"token_logprob: logits {rule} {kind} in row {first}"):
        token_logprob(bad, torch.zeros(rows, dtype=torch.int64), backend=backend)
    if kind == "NaN":  # among masked tokens, before any other logit, and with a payload of its own
        bad[first] = -INF
        bad[first, column] = value
        if dtype == torch.float32:
            bad.view(torch.int32)[first, column] = 0x7F800001
        with pytest.raises(ValueError, match=f"got NaN in row {first}"):
            candidate_td(bad, good, backend=backend)


@each_backend
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda **k: candidate_td(OK, OK, p_min=0.0, **k), ValueError, "p_min must be > 0 and <= 1, got 0.0"),
        (lambda **k: candidate_td(OK, OK, p_min=1.5, **k), ValueError, "p_min must be > 0 and <= 1, got 1.5"),
        (lambda **k: candidate_td(OK, OK, p_min=NAN, **k), ValueError, "p_min must be > 0 and <= 1, got nan"),
        (lambda **k: candidate_td(OK, OK, p_min="a", **k), TypeError, "p_min must be a number, got str"),
        (lambda **k: candidate_td(OK, OK, beta=True, **k), TypeError, "beta must be a number, got bool"),
        (lambda **k: candidate_td(OK, OK, beta=INF, **k), ValueError, "beta must be > 0 and finite, got inf"),
        (
            lambda **k: candidate_td(OK, OK, policy_temperature=0, **k),
            ValueError,
            "policy_temperature must be >= 1e-30 and <= 1e30, got 0.0",
        ),
        (
            lambda **k: candidate_td(OK, OK, reward_temperature=-1, **k),
            ValueError,
            "reward_temperature must be >= 1e-30 and <= 1e30, got -1.0",
        ),
        (lambda **k: candidate_td(OK[0], OK, **k), ValueError, r"policy_logits must have 2 dimension\(s\)"),
        (
            lambda **k: candidate_td(OK, OK[:2], **k),
            ValueError,
            r"reward_logits must have shape \(3, 4\), got \(2, 4\)",
        ),
        (lambda **k: candidate_td(OK[:, :0], OK[:, :0], **k), ValueError, "at least one column"),
        (lambda **k: candidate_td(OK.long(), OK, **k), TypeError, "policy_logits must have dtype .*, got int64"),
        (lambda **k: candidate_td(OK, [[1.0]], **k), TypeError, "reward_logits must be a torch.Tensor, got list"),
        (
            lambda **k: candidate_td(OK, OK, sampled=torch.tensor([0, 4, 9]), **k),
            ValueError,
            "sampled must be >= 0 and < 4 .*, got 4 in row 1",
        ),
        (lambda **k: candidate_td(OK, OK, sampled=IDS[:2], **k), ValueError, r"sampled must have shape \(3,\)"),
        (
            lambda **k: candidate_td(OK, OK, sampled=IDS.int(), **k),
            TypeError,
            "sampled must have dtype int64, got int32",
        ),
        (
            lambda **k: token_logprob(OK, torch.tensor([0, 1, -100]), **k),
            ValueError,
            "ids must be >= 0 and < 4 .*no ignored id such as -100.* got -100 in row 2",
        ),
        (lambda **k: token_logprob(OK, IDS.float(), **k), TypeError, "ids must have dtype int64, got float32"),
        (lambda **k: token_logprob(OK, IDS[:1], **k), ValueError, r"ids must have shape \(3,\), got \(1,\)"),
        (lambda **k: token_logprob(OK, IDS, temperature=INF, **k), ValueError, "temperature must be >= 1e-30"),
        (
            lambda **k: linear_candidate_td(OK, OK, policy_weight=WEIGHT[:, :3], reward_weight=WEIGHT, **k),
            ValueError,
            r"policy_weight must have shape \(4, 4\), got \(4, 3\)",
        ),
        (
            lambda **k: linear_candidate_td(OK, OK, policy_weight=WEIGHT, reward_weight=WEIGHT[:3], **k),
            ValueError,
            r"reward_weight must have shape \(4, 4\), got \(3, 4\)",
        ),
        (
            lambda **k: linear_candidate_td(OK, OK[:2], policy_weight=WEIGHT, reward_weight=WEIGHT, **k),
            ValueError,
            r"reward_hidden must have shape \(3, 4\), got \(2, 4\)",
        ),
        (
            lambda **k: linear_candidate_td(OK, OK, policy_weight=WEIGHT.double(), reward_weight=WEIGHT, **k),
            TypeError,
            "policy_weight must have dtype float32, got float64",
        ),
        (
            lambda **k: linear_candidate_td(OK, OK, policy_weight=WEIGHT[:0], reward_weight=WEIGHT[:0], **k),
            ValueError,
            "policy_weight must have at least one row",
        ),
    ],
)
def test_errors(backend: str, call: Callable[..., object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(backend=backend)
