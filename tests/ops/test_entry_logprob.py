"""entry_logprob and its linear form: every backend of dist_ppo against log_softmax in float64, gradients, errors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast.ops import entry_logprob, linear_entry_logprob
from prmfast.testing import make_inputs
from tests.ops.device import backends, device_of, interpreted

each_backend = pytest.mark.parametrize("backend", backends("dist_ppo"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def case(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and entries in two of three rows; NaN in a row without any."""
    made = make_inputs("dist_ppo", rows, columns, dtype=dtype)
    logits, offsets, ids = made["logits"].to(device), *(t.to(device) for t in made["candidates"][:2])  # type: ignore[attr-defined, index]
    logits[offsets.diff() == 0] = math.nan
    return logits, offsets, ids


def by_formula(logits: Tensor, offsets: Tensor, ids: Tensor, temperature: float) -> Tensor:
    rows = torch.arange(len(logits), device=ids.device).repeat_interleave(offsets.diff())
    return (logits.double()[rows] / temperature).log_softmax(1).gather(1, ids[:, None])[:, 0]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [5, 33, 2064])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradient(backend: str, dtype: torch.dtype, columns: int, temperature: float) -> None:
    if interpreted(backend) and (columns != 33 or dtype == torch.float64):
        pytest.skip("one size in the interpreter")
    logits, offsets, ids = case(7, columns, dtype, device_of(backend))
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = entry_logprob(leaf, offsets, ids, temperature=temperature, backend=backend)
    expected = by_formula(truth, offsets, ids, temperature)
    assert found.dtype == torch.float64
    step = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    weight = torch.randn(len(ids), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(ids.device)
    (grad,) = torch.autograd.grad((weight * found).sum(), leaf)
    (wanted,) = torch.autograd.grad((weight * expected).sum(), truth)
    assert grad.dtype == dtype
    read = offsets.diff() > 0
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    atol = rtol * float(wanted[read].abs().max()) if dtype in (torch.float32, torch.float64) else 1e-6
    torch.testing.assert_close(grad[read].double(), wanted[read], rtol=rtol, atol=atol)
    assert (grad[~read] == 0).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_form(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    _, offsets, ids = case(7, 33, dtype, device_of(backend))
    hidden, weight = (
        torch.randn(n, 16, generator=generator, dtype=torch.float64).to(device_of(backend), dtype) for n in (7, 33)
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_entry_logprob(hidden, weight, offsets, token_ids=ids, temperature=0.7, backend=backend)
    expected = by_formula(hidden.double() @ weight.double().T, offsets, ids, 0.7)
    step = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    scale = torch.linspace(-1, 1, len(ids), dtype=torch.float64, device=ids.device)
    for inputs in ((hidden, weight), (hidden,), (weight,)):
        grads, wanted = (torch.autograd.grad((scale * x).sum(), inputs, retain_graph=True) for x in (found, expected))
        for own, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=step, atol=step * float(other.abs().max()))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_known_normalizer_saves_the_forward_pass(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    logits, offsets, ids = case(7, 33, dtype, device)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64).to(device, dtype) for n in (7, 33))
    scale = torch.linspace(-1, 1, len(ids), dtype=torch.float64, device=device)
    step = 1e-12 if dtype == torch.float64 else 1e-5
    rows = offsets.diff() > 0
    forms: list[tuple[tuple[Tensor, ...], Any]] = [
        ((logits,), entry_logprob),
        ((hidden, weight), linear_entry_logprob),
    ]
    for inputs, of in forms:
        leaves = [t.requires_grad_() for t in inputs]
        table = (leaves[0] if len(leaves) == 1 else hidden.double() @ weight.double().T).detach().double()
        lse = (table / 0.7).logsumexp(1)  # NaN in a row that has no entries
        op = partial(of, *leaves, offsets=offsets, token_ids=ids, temperature=0.7, backend=backend)
        found, expected = op(lse=lse), op()
        torch.testing.assert_close(found, expected, rtol=step, atol=step)
        grads, wanted = (torch.autograd.grad((scale * x).sum(), leaves) for x in (found, expected))
        for own, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=step, atol=step * float(other.abs().max()))
        torch.testing.assert_close(op(lse=lse + 1), expected - 1, rtol=step, atol=step)  # it is not computed again
        with pytest.raises(ValueError, match=r"lse must have shape \(7,\), got \(6,\)"):
            op(lse=lse[1:])
        with pytest.raises(TypeError, match="lse must have dtype float64, got float32"):
            op(lse=lse.float())
        with pytest.raises(ValueError, match=f"such a row: row {int(rows.nonzero()[0])}"):
            op(lse=torch.full_like(lse, torch.nan))
        with pytest.raises(ValueError, match="token_ids must be >= 0 and < V = 33"):
            op(token_ids=ids + 33, lse=lse)


def test_gradcheck() -> None:
    offsets, ids = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 0, 2, 4])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entry_logprob(x, offsets, ids, temperature=1.3), (logits,))
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: linear_entry_logprob(h, w, offsets, token_ids=ids), (logits, weight))


def test_a_second_derivative_is_refused() -> None:
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    found = entry_logprob(logits, torch.tensor([0, 1]), torch.tensor([2]))
    (grad,) = torch.autograd.grad(found.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_no_rows_and_no_entries() -> None:
    for rows in (0, 3):
        logits = torch.zeros(rows, 4, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        found = entry_logprob(logits, torch.zeros(rows + 1, dtype=torch.int64), none)
        (grad,) = torch.autograd.grad(found.sum(), logits)
        assert found.shape == (0,)
        assert (grad == 0).all()


def test_errors() -> None:
    logits, offsets, ids = torch.zeros(2, 4), torch.tensor([0, 1, 2]), torch.tensor([1, 3])
    with pytest.raises(TypeError, match=r"entry_logprob: logits must be a torch\.Tensor, got int"):
        entry_logprob(0, offsets, ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"entry_logprob: offsets must have shape \(3,\), got \(2,\)"):
        entry_logprob(logits, offsets[:2], ids)
    with pytest.raises(ValueError, match="token_ids must be >= 0 and < V = 4, got 4"):
        entry_logprob(logits, offsets, ids + 1)
    with pytest.raises(ValueError, match="must increase within a row, got 1 after 1"):
        entry_logprob(logits, torch.tensor([0, 2, 2]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        linear_entry_logprob(logits, logits, offsets, token_ids=ids, temperature=0)
    with pytest.raises(ValueError, match="such a row: row 1"):
        entry_logprob(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), offsets, torch.tensor([0, 1]))
