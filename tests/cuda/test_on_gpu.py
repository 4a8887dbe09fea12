"""candidate_td and dist_ppo's CUDA kernels where there is a GPU: full vocabularies, CUDA graphs, rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast import ops
from prmfast.kernels.dist_ppo.reference import Rule
from prmfast.ops._backends import load, why_missing
from prmfast.testing import make_candidates, make_inputs
from tests.ops.device import moved

missing = why_missing("candidate_td", "cuda")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS = {"p_min": 0.1, "beta": 10.0, "policy_temperature": 1.0, "reward_temperature": 1.0}
RULE = Rule(0.2, 0.28, None, 1.0)


def inputs(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = moved(make_inputs("candidate_td", rows, columns, dtype=dtype), "cuda")
    return made["policy_logits"], made["reward_logits"], made["sampled"]


def replayed(call: Callable[[], Any], outputs: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    """What a captured ``call`` leaves when its graph runs over outputs that were lost."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs(call())
    for tensor in found:
        tensor.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    return found


@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(1, 151_936), (300, 151_936), (7, 50_257)])
def test_full_vocabularies(dtype: torch.dtype, rows: int, columns: int) -> None:
    p, q, sampled = inputs(rows, columns, dtype)
    found = ops.candidate_td(p, q, sampled=sampled, backend="cuda")
    expected = ops.candidate_td(p, q, sampled=sampled, backend="reference")
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.policy_logp, expected.policy_logp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.advantage, expected.advantage, rtol=2e-6, atol=2e-5)
    row = slice(rows // 2, rows // 2 + 1)
    alone = ops.candidate_td(p[row].clone(), q[row].clone(), sampled=sampled[row], backend="cuda")
    begin, end = found.offsets[rows // 2 : rows // 2 + 2].tolist()
    assert all(torch.equal(a, b[begin:end]) for a, b in zip(alone[1:], found[1:], strict=True))


@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(1, 151_936), (300, 151_936), (7, 50_257), (3, 500_000)])
def test_one_launch_gives_the_bits_of_two(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Clusters of every size, a row that fits in part, rows of every alignment."""
    p, _, _ = inputs(rows, columns, dtype)
    candidates = moved(make_candidates((p / 1.5 - 0.1 * p.roll(1, 0)).cpu(), p_min=0.02, every=3), "cuda")
    weight = torch.full((rows,), 50.0, device="cuda")
    leaf = p.clone().requires_grad_()
    loss = ops.dist_ppo_loss(leaf, candidates, row_weight=weight, backend="cuda")
    (expected,) = torch.autograd.grad(loss, leaf)
    again, grad = ops.dist_ppo_loss_and_grad(p, candidates, row_weight=weight, out=p, backend="cuda")
    assert torch.equal(again, loss.detach())
    assert torch.equal(grad, expected)
    with torch.no_grad():
        truth, slow = ops.dist_ppo_loss_and_grad(leaf, candidates, row_weight=weight, backend="reference")
    torch.testing.assert_close(again, truth, rtol=2e-6, atol=1e-6)
    step = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(grad.double(), slow.double(), rtol=step, atol=1e-6 * float(slow.double().abs().max()))


@each_dtype
def test_padded_candidates_in_a_graph(dtype: torch.dtype) -> None:
    p, q, sampled = inputs(20, 5000, dtype)
    padded = load("candidate_td", "cuda").padded
    found = replayed(lambda: padded(p, q, sampled=sampled, **OPTIONS), list)
    expected = padded(p, q, sampled=sampled, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (expected.counts > 0).all()


@each_dtype
def test_loss_and_gradient_in_a_graph(dtype: torch.dtype) -> None:
    made = moved(make_inputs("dist_ppo", 20, 5000, dtype=dtype), "cuda")
    logits, candidates = made["logits"], made["candidates"]
    weight, out = torch.ones(20, dtype=torch.float64, device="cuda"), torch.empty_like(logits)
    run = load("dist_ppo", "cuda").dist_ppo_with_grad
    found = replayed(lambda: run(logits, candidates, weight, RULE, out=out), lambda told: [told[0], told[1], out])
    kept = [tensor.clone() for tensor in found]
    loss, lse = run(logits, candidates, weight, RULE, out=out)
    assert all(torch.equal(a, b) for a, b in zip(kept, (loss, lse, out), strict=True))
