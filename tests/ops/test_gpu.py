"""What only a GPU can show: every kernel of every backend once, streams, CUDA graphs, and equal answers of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast import ops
from prmfast.ops._backends import ROOMS
from prmfast.testing import make_candidates, make_inputs, make_picnn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(room: str) -> list[str]:
    return [b for b in ops.available(room, "cuda") if b != "reference"] if torch.cuda.is_available() else []


each_backend = pytest.mark.parametrize(
    ("room", "backend"), [(room, backend) for room in ROOMS for backend in (on_gpu(room) or ["none"])]
)


def calls(room: str, dtype: torch.dtype) -> dict[str, Callable[[str], Any]]:
    """Every public op of ``room`` on small inputs, by the name of its backend."""
    from tests.ops.device import moved

    made = moved(make_inputs(room, 5, 301, dtype=dtype), "cuda")
    if room == "ias":
        q, target = made["quantiles"], made["target"]
        leaf = q.clone().requires_grad_()
        return {
            "budget": lambda b: ops.ias_budget(q, target, 64, backend=b),
            "long budget": lambda b: ops.ias_budget(q, target, 1000, backend=b),
            "curve": lambda b: ops.ias_curve(q, 70, backend=b),
            "slope": lambda b: torch.autograd.grad(ops.ias_curve(leaf, 9, backend=b).sum(), leaf),
            "allocate": lambda b: ops.ias_allocate(q, 40, 64, backend=b),
        }
    if room == "picnn":
        context, levels = made["context"], made["levels"]
        params = moved(make_picnn(5, (32, 32), dtype=dtype, curvature=True), "cuda")  # wide enough for every backend

        def derivatives(b: str) -> Any:
            leaves = [t.detach().clone().requires_grad_() for t in (context, levels)]
            value, gradient = ops.picnn_map(params, *leaves, backend=b)
            return torch.autograd.grad(value.sum() + gradient.square().sum(), leaves)

        return {"map": lambda b: ops.picnn_map(params, context, levels, backend=b), "derivatives": derivatives}
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).to("cuda", dtype) for n in (5, 301))
    if room == "candidate_td":
        p, q, ids = made["policy_logits"], made["reward_logits"], made["sampled"]
        leaf = p.clone().requires_grad_()
        sides = {"policy_weight": weight, "reward_weight": weight.flip(0)}
        return {
            "candidates": lambda b: ops.candidate_td(p, q, sampled=ids, backend=b),
            "logprob": lambda b: ops.token_logprob(p, ids, backend=b),
            "slope": lambda b: torch.autograd.grad(ops.token_logprob(leaf, ids, backend=b)[:1].sum(), leaf),
            "linear": lambda b: ops.linear_candidate_td(hidden, hidden, **sides, backend=b),
        }
    logits, candidates = made["logits"], made["candidates"]
    leaf = logits.clone().requires_grad_()
    layer = [t.clone().requires_grad_() for t in (hidden, weight)]
    own = moved(make_candidates((hidden @ weight.T).double().cpu()), "cuda")
    return {
        "loss": lambda b: ops.dist_ppo_loss(logits, candidates, backend=b),
        "slope": lambda b: torch.autograd.grad(ops.dist_ppo_loss(leaf, candidates, backend=b), leaf),
        "loss and gradient": lambda b: ops.dist_ppo_loss_and_grad(logits, candidates, backend=b),
        "linear": lambda b: torch.autograd.grad(ops.linear_dist_ppo_loss(*layer, own, backend=b), layer),
    }


def takes(call: Callable[[str], Any], backend: str) -> Any:
    """The answer; skips where the backend says that it does not take such a call."""
    try:
        return call(backend)
    except ValueError as error:
        if "does not take this call" in str(error):
            return None
        raise


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for item in value for leaf in leaves(item)]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_once(room: str, backend: str, dtype: torch.dtype) -> None:
    """Small enough for compute-sanitizer, which this test runs under in `make gpu`."""
    for name, call in calls(room, dtype).items():
        found, truth = takes(call, backend), call("reference")
        if found is None:
            continue
        for a, b in zip(leaves(found), leaves(truth), strict=True):
            slack = 2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 2e-5
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=slack, atol=slack * scale, msg=lambda m, n=name: f"{n}: {m}")


@each_backend
def test_work_goes_to_the_current_stream(room: str, backend: str) -> None:
    made = calls(room, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for call in made.values():
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what ran elsewhere would be done before
            found = takes(call, backend)
        torch.cuda.synchronize()
        if found is not None:
            again = call(backend)
            assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(again), strict=True))


@pytest.mark.parametrize("backend", on_gpu("picnn") or ["none"])
def test_a_map_can_be_captured_as_a_graph(backend: str) -> None:
    call = calls("picnn", torch.float32)["map"]
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside), torch.no_grad():
        expected = call(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = call(backend)
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
