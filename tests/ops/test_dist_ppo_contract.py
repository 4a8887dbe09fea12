"""Room dist_ppo: the linear layer in blocks, the released and paper vectors, registration, compilation, errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from prmfast import ops
from prmfast.kernels.dist_ppo import reference
from prmfast.ops import Candidates
from prmfast.ops._backends import load
from prmfast.testing import make_candidates
from tests.ops.device import (
    GPU,
    backends,
    device_of,
    dist_ppo_loss,
    dist_ppo_loss_and_grad,
    interpreted,
    linear_dist_ppo_loss,
    moved,
    taking,
)
from tests.ops.test_dist_ppo import DTYPES, by_formula, each_backend, each_dtype, entry_rows, inputs, truth
from tests.vectors import Vectors, assert_relative

BACKENDS = backends("dist_ppo")
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled backend is not here")

RULE = [0.2, 0.28, math.inf, 1.0]

# --- the linear layer


def layer(rows: int, columns: int, width: int, dtype: torch.dtype, every: int = 3) -> tuple[Tensor, Tensor, Candidates]:
    generator = torch.Generator().manual_seed(rows + columns)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(columns, width, generator=generator) * 2 / width**0.5).to(dtype)
    logits = hidden.double() @ weight.double().T
    old = logits + 0.3 * torch.randn(rows, columns, generator=generator)
    return hidden, weight, make_candidates(old, p_min=0.01, every=every)


def linear_truth(
    hidden: Tensor, weight: Tensor, candidates: Candidates, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (t.double().detach().clone().requires_grad_() for t in (hidden, weight))
    loss = by_formula(h @ w.T, candidates, **options)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def assert_near(found: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    step = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[found.dtype]
    noise = 2.0**-24 if found.dtype == torch.float16 else 0.0
    scale = 1e-12 if found.dtype == torch.float64 else 3e-6
    allowed = step * expected.abs() + scale * expected.abs().max() + noise + floor
    assert ((found.double() - expected).abs() <= allowed).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("columns", [1, 17, 300, 3001])
@pytest.mark.parametrize("every", [2, 1000], ids=["gaps", "full"])
def test_linear_is_the_formula(
    backend: str, dtype: torch.dtype, columns: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpreted(backend) and (columns > 300 or every > 2):
        pytest.skip("slow in the interpreter; 300 columns are two blocks already")
    if backend != "reference":  # several blocks, the last one shorter
        monkeypatch.setattr("prmfast.kernels.dist_ppo.tuning.BLOCK_BYTES", 9 * 300 * 4)
    hidden, weight, candidates = layer(9, columns, 12, dtype, every)
    options = {"temperature": 0.8, "row_weight": torch.linspace(0.5, 30, 9), "dual_clip": 2.0}
    loss, d_hidden, d_weight = linear_truth(hidden, weight, candidates, **options)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_dist_ppo_loss(h, w, candidates, backend=backend, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx(float(loss), rel=3e-6, abs=1e-6)
    found.backward()
    assert h.grad is not None
    assert w.grad is not None
    assert h.grad.dtype == w.grad.dtype == dtype
    floor = 1e-13 if columns == 1 else 0.0  # all that is left is the rounding of the truth
    assert_near(h.grad, d_hidden, floor)
    assert_near(w.grad, d_weight, floor)


@each_backend
def test_linear_computes_only_what_is_wanted(backend: str) -> None:
    hidden, weight, candidates = layer(4 if interpreted(backend) else 9, 300, 12, torch.float32)
    _, d_hidden, d_weight = linear_truth(hidden, weight, candidates)
    h = hidden.clone().requires_grad_()
    linear_dist_ppo_loss(h, weight, candidates, backend=backend).backward()
    assert h.grad is not None
    assert_near(h.grad, d_hidden)
    w = weight.clone().requires_grad_()
    linear_dist_ppo_loss(hidden, w, candidates, backend=backend).backward()
    assert w.grad is not None
    assert_near(w.grad, d_weight)
    hidden, weight, lists, one = moved((hidden, weight, list(candidates), torch.ones(())), device_of(backend))
    backend = taking("dist_ppo", backend, op="linear_dist_ppo")
    _, lse, coefficients = torch.ops.prmfast.linear_dist_ppo(hidden, weight, lists, None, RULE, backend)
    for wanted in ([True, False], [False, True]):
        grads = torch.ops.prmfast.linear_dist_ppo_backward(
            one, hidden, weight, *lists[:2], lse, coefficients, 1.0, wanted, backend
        )
        assert [bool(grad.numel()) for grad in grads] == wanted


@each_backend
def test_linear_of_strided_inputs_and_clipped_rows(backend: str) -> None:
    hidden, weight, candidates = layer(9, 300, 12, torch.float32)
    clipped = candidates._replace(
        policy_logp=torch.where(entry_rows(candidates) % 2 == 0, -40.0, candidates.policy_logp),
        advantage=candidates.advantage.abs(),
    )
    loss, d_hidden, d_weight = linear_truth(hidden, weight, clipped)
    assert (d_hidden[::2] == 0).all()
    h = hidden.T.contiguous().T.requires_grad_()
    w = torch.cat([weight, weight], 1)[:, :12].requires_grad_()
    found = linear_dist_ppo_loss(h, w, clipped, backend=backend)
    assert float(found) == pytest.approx(float(loss), rel=3e-6)
    grads = torch.autograd.grad(found, (h, w))
    assert_near(grads[0], d_hidden)
    assert_near(grads[1], d_weight)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("reference", "cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_never_holds_the_logits(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, width = (4, 2000, 2) if interpreted(backend) else (50, 20_000, 6)
    most = rows * 512 * 8  # bytes: a block of 512 columns in float64
    monkeypatch.setattr("prmfast.kernels.dist_ppo.tuning.BLOCK_BYTES", most)
    hidden, weight, candidates = moved(layer(rows, columns, width, dtype), device_of(backend))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.nbytes)
            return out

    module, rule = load("dist_ppo", backend), reference.Rule(0.2, 0.28, None, 1.0)
    with Watch():  # of the implementation itself: it does not look inside an op
        _, lse, coefficients = module.linear_dist_ppo(
            hidden, weight, candidates, row_weight=torch.ones_like(hidden[:, 0]), rule=rule
        )
        module.linear_dist_ppo_backward(
            hidden,
            weight,
            candidates.offsets,
            token_ids=candidates.token_ids,
            lse=lse,
            coefficients=coefficients,
            temperature=1.0,
            wanted=(True, False),
        )
    assert rows * 256 * 4 <= largest <= most


@needs_cpu
def test_linear_threads_change_nothing() -> None:
    hidden, weight, candidates = layer(40, 5000, 16, torch.float32)
    state = torch.ops.prmfast.linear_dist_ppo(hidden, weight, list(candidates), None, RULE, "cpu")
    torch.set_num_threads(3)
    try:
        again = torch.ops.prmfast.linear_dist_ppo(hidden, weight, list(candidates), None, RULE, "cpu")
    finally:
        torch.set_num_threads(1)
    for one, three in zip(state, again, strict=True):  # torch's product may differ by thread count in its last bit
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)


# --- vectors


def vector_candidates(given: dict[str, Tensor], wanted: dict[str, Tensor], keep: Tensor) -> Candidates:
    """The masked candidates of the padded layout, sorted by token within each row."""
    ids, order = wanted["indices"].flatten(0, 1).sort(1)
    take = {
        name: tensor.flatten(0, 1).gather(1, order)
        for name, tensor in (("mask", keep), ("logp", wanted["old_logp_f64"]), ("td", given["candidate_td"]))
    }
    mask = take["mask"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Candidates(offsets, ids[mask], take["logp"][mask], take["td"][mask])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors(backend: str, dtype: torch.dtype, shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "distrl_policy_loss.npz")
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for case in vectors.cases[: 2 if interpreted(backend) else None]:
        given, wanted, params = vectors.inputs(case), vectors.outputs(case), case["params"]
        candidates = vector_candidates(given, wanted, wanted["candidate_mask"])
        logits = given["policy_logits"].flatten(0, 1).to(dtype)
        total = float(candidates.policy_logp.exp().sum())
        released = {
            "clip_low": params["cliprange"],
            "clip_high": params["cliprange"],
            "dual_clip": params["clip_ratio_c"],
            "row_weight": torch.full((len(logits),), 1 / total if total else 1.0, dtype=torch.float64),
        }
        leaf = logits.clone().requires_grad_()
        loss = dist_ppo_loss(leaf, candidates, backend=backend, **released)
        (grad,) = torch.autograd.grad(loss, leaf)
        if total == 0:  # the released code divides 0 by 0
            assert wanted["topk_pg_loss_f64"].isnan()
            assert loss.item() == 0
            assert (grad == 0).all()
        else:
            assert float(loss) == pytest.approx(float(wanted["topk_pg_loss_f64"]), rel=rtol)
            assert_relative(grad.double(), wanted["glogits_dist_f64"].flatten(0, 1), rtol)
        if interpreted(backend):  # half a minute more for the same kernels
            continue
        check_paper_vector(backend, leaf, given=given, wanted=wanted, params=params, rtol=rtol)


def check_paper_vector(
    backend: str,
    logits: Tensor,
    *,
    given: dict[str, Tensor],
    wanted: dict[str, Tensor],
    params: dict[str, float],
    rtol: float,
) -> None:
    """Equation 12 averaged over sequences; with the token branch in plain torch, the gradient of both."""
    mask = given["response_mask"]
    likely = wanted["old_logp_f64"].exp() >= params["min_probability"]
    candidates = vector_candidates(given, wanted, likely & mask[..., None])  # the released mask drops the last token
    lengths = mask.sum(1).double()
    weight = (mask / lengths[:, None] / len(mask)).flatten()
    clip = {"clip_low": params["clip_ratio_low"], "clip_high": params["clip_ratio_high"]}
    loss = dist_ppo_loss(logits, candidates, row_weight=weight, backend=backend, **clip)
    assert float(loss) == pytest.approx(float(wanted["paper_dist_ppo"]), rel=rtol, abs=1e-12)
    tokens = given["tokens"].flatten()[:, None]
    logp = logits.double().log_softmax(1).gather(1, tokens)[:, 0]
    old = given["old_logits"].flatten(0, 1).log_softmax(1).gather(1, tokens)[:, 0]
    rho, advantage = (logp - old).exp(), given["advantages"].flatten()
    clipped = rho.clamp(1 - clip["clip_low"], 1 + clip["clip_high"])
    token_loss = -(weight * torch.minimum(rho * advantage, clipped * advantage)).sum()
    assert float(token_loss) == pytest.approx(float(wanted["paper_tok_ppo"]), rel=rtol)
    (grad,) = torch.autograd.grad(token_loss + 0.1 * loss, logits)
    assert_relative(grad.double(), wanted["paper_glogits_total_alpha0.1"].flatten(0, 1), rtol)


# --- registration


@each_backend
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.float64, 0)])
def test_opcheck(backend: str, dtype: torch.dtype, rows: int) -> None:
    if interpreted(backend) and dtype == torch.bfloat16:
        pytest.skip("slow in the interpreter, and what is registered does not depend on the dtype")
    prmfast = torch.ops.prmfast
    rows = min(rows, 2) if interpreted(backend) else rows
    made = inputs(rows, 20, dtype), torch.ones(()), torch.ones(rows), torch.randn(rows, 4).to(dtype)
    (logits, candidates), one, weight, hidden = moved(made, device_of(backend))
    matrix, lists = moved(torch.randn(20, 4).to(dtype), device_of(backend)), list(candidates)
    linear = taking("dist_ppo", backend, op="linear_dist_ppo", dtype=dtype)
    backend = taking("dist_ppo", backend, dtype=dtype)
    opcheck(prmfast.dist_ppo.default, (logits, lists, None, RULE, backend))
    opcheck(prmfast.dist_ppo.default, (logits.clone().requires_grad_(), lists, weight, RULE, backend))
    opcheck(prmfast.dist_ppo_with_grad.default, (logits, lists, weight, RULE, backend))
    opcheck(prmfast.dist_ppo_with_grad_out.default, (logits, lists, weight, RULE, backend, torch.zeros_like(logits)))
    opcheck(prmfast.dist_ppo_with_grad_.default, (logits.clone(), lists, weight, RULE, backend))
    _, lse, coefficients = prmfast.dist_ppo(logits, lists, weight, RULE, backend)
    state = (*candidates[:2], lse, coefficients, 1.0)
    opcheck(prmfast.dist_ppo_backward.default, (one, logits, *state, backend))
    opcheck(prmfast.linear_dist_ppo.default, (hidden, matrix, lists, weight, RULE, linear))
    leaves = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    opcheck(prmfast.linear_dist_ppo.default, (*leaves, lists, weight, RULE, linear))
    _, lse, coefficients = prmfast.linear_dist_ppo(hidden, matrix, lists, weight, RULE, linear)
    state = (*candidates[:2], lse, coefficients, 1.0)
    for wanted in ([True, True], [False, True]):
        opcheck(prmfast.linear_dist_ppo_backward.default, (one, hidden, matrix, *state, wanted, linear))


def every_op(logits: Tensor, hidden: Tensor, weight: Tensor, out: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
    candidates, logits = Candidates(*fields), logits * 0.5
    loss = ops.dist_ppo_loss(logits, candidates, dual_clip=3)
    linear = ops.linear_dist_ppo_loss(hidden, weight, candidates, temperature=0.9)
    fresh_loss, fresh = ops.dist_ppo_loss_and_grad(logits, candidates, row_weight=out[:, 0] * 0 + 1)
    into_loss, into = ops.dist_ppo_loss_and_grad(logits, candidates, out=out)
    place = logits.clone()
    place_loss, same = ops.dist_ppo_loss_and_grad(place, candidates, out=place)
    return loss, linear, fresh_loss, fresh + 1, into_loss, into * 2, place_loss, same + place


@pytest.mark.parametrize("device", ["cpu", "cuda"] if GPU else ["cpu"])
def test_compile_fullgraph(device: str) -> None:
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    for rows in (7, 10):  # the second call recompiles with dynamic sizes
        logits, candidates = moved(inputs(rows, 20, torch.float32), device)
        hidden, weight = torch.randn(rows, 4, device=device), torch.randn(20, 4, device=device)
        outs = torch.zeros(rows, 20, device=device), torch.zeros(rows, 20, device=device)
        got = compiled(logits, hidden, weight, outs[0], *candidates)
        expected = every_op(logits, hidden, weight, outs[1], *candidates)
        for one, other in zip((*got, outs[0]), (*expected, outs[1]), strict=True):
            torch.testing.assert_close(one, other)
    leaves = tuple(t.clone().requires_grad_() for t in (logits, hidden, weight))

    def total(x: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return ops.dist_ppo_loss(x * 2, candidates) + ops.linear_dist_ppo_loss(h, w, candidates)

    wanted = torch.autograd.grad(total(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_every_backend_has_the_same_parameters() -> None:
    for name in load("dist_ppo", "cpu").__all__ if "cpu" in BACKENDS else ():
        wanted = inspect.signature(getattr(reference, name)).parameters
        for backend in BACKENDS:
            if backend == "cuda" and name.startswith("linear"):  # which does not take such calls
                continue
            assert inspect.signature(getattr(load("dist_ppo", backend), name)).parameters == wanted


def test_the_slopes_are_those_of_the_terms() -> None:
    logits, candidates = inputs(60, 40, torch.float64)
    for rule in (
        reference.Rule(0.2, 0.28, None, 1.0),
        reference.Rule(0.0, 0.1, 1.2, 1.0),
        reference.Rule(0.0, 0.0, None, 1.0),
    ):
        logp = logits.log_softmax(1)[entry_rows(candidates), candidates.token_ids]
        logp = torch.where(torch.arange(len(logp)) % 4 == 0, candidates.policy_logp, logp).requires_grad_()  # ties
        (expected,) = torch.autograd.grad(reference.terms(logp, candidates, rule).sum(), logp)
        torch.testing.assert_close(reference.slopes(logp, candidates, rule).detach(), expected, rtol=1e-14, atol=0)


@each_backend
def test_second_derivative_says_no(backend: str) -> None:
    logits, candidates = inputs(3, 9, torch.float64)
    leaf = logits.requires_grad_()
    (first,) = torch.autograd.grad(dist_ppo_loss(leaf, candidates, backend=backend), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="dist_ppo_loss is differentiable once"):
        first.sum().backward()
    hidden, weight = torch.randn(3, 2, requires_grad=True), torch.randn(9, 2)
    loss = linear_dist_ppo_loss(hidden, weight, candidates, backend=backend)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_dist_ppo_loss is differentiable once"):
        first.sum().backward()


@each_backend
def test_nothing_large_is_saved(backend: str) -> None:
    logits, candidates = inputs(4, 500, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        dist_ppo_loss(logits.requires_grad_(), candidates, backend=backend)
    large = [t for t in saved if t.numel() >= 500]
    assert len(large) == 1
    assert large[0].data_ptr() == logits.data_ptr()


# --- errors

OK = torch.zeros(2, 4)
FINE = Candidates(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([-1.0, -1.0, -2.0]), torch.ones(3))
BAD = [float("nan"), float("inf")]
Call = Callable[[Tensor, Candidates, dict[str, Any]], Any]


def with_field(name: str, value: object) -> Candidates:
    return FINE._replace(**{name: value})  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize(
    ("logits", "candidates", "options", "error", "message"),
    [
        (OK[0], FINE, {}, ValueError, r"logits must have 2 dimension\(s\), got shape \(4,\)"),
        (OK.long(), FINE, {}, TypeError, "logits must have dtype .*, got int64"),
        ([[0.0]], FINE, {}, TypeError, "logits must be a torch.Tensor, got list"),
        (OK, tuple(FINE), {}, TypeError, "candidates must be Candidates, got tuple"),
        (OK, with_field("offsets", [0, 2, 3]), {}, TypeError, "candidates.offsets must be a torch.Tensor, got list"),
        (
            OK,
            with_field("offsets", FINE.offsets.int()),
            {},
            TypeError,
            "candidates.offsets must have dtype int64, got int32",
        ),
        (
            OK,
            with_field("offsets", FINE.offsets[:2]),
            {},
            ValueError,
            r"candidates.offsets must have shape \(3,\), got \(2,\)",
        ),
        (
            OK,
            with_field("offsets", torch.tensor([0, 3, 2])),
            {},
            ValueError,
            "offsets must not decrease, got 2 after 3 in row 1",
        ),
        (OK, with_field("offsets", torch.tensor([0, 2, 2])), {}, ValueError, "must run from 0 to nnz = 3, got 0 to 2"),
        (OK, with_field("offsets", torch.tensor([1, 2, 3])), {}, ValueError, "must run from 0 to nnz = 3, got 1 to 3"),
        (
            OK,
            with_field("token_ids", torch.tensor([0, 4, 1])),
            {},
            ValueError,
            "token_ids must be >= 0 and < V = 4, got 4 in entry 1",
        ),
        (
            OK,
            with_field("token_ids", torch.tensor([0, 2, -1])),
            {},
            ValueError,
            "token_ids must be .*, got -1 in entry 2",
        ),
        (
            OK,
            with_field("token_ids", torch.tensor([2, 2, 1])),
            {},
            ValueError,
            "must increase within a row, got 2 after 2 in entry 1",
        ),
        (
            OK,
            with_field("token_ids", torch.tensor([0.0, 2.0, 1.0])),
            {},
            TypeError,
            "candidates.token_ids must have dtype int64",
        ),
        (
            OK,
            with_field("policy_logp", torch.zeros(2)),
            {},
            ValueError,
            r"candidates.policy_logp must have shape \(3,\)",
        ),
        (
            OK,
            with_field("policy_logp", torch.tensor([0, math.nan, 0])),
            {},
            ValueError,
            "policy_logp must be finite or -inf, got nan in entry 1",
        ),
        (OK, with_field("advantage", torch.ones(3).long()), {}, TypeError, "candidates.advantage must have dtype"),
        (
            OK,
            with_field("advantage", torch.tensor([0, 0, -math.inf])),
            {},
            ValueError,
            "advantage must be finite .*, got -inf in entry 2",
        ),
        (OK, FINE, {"clip_low": 1.0}, ValueError, r"clip_low must lie in \[0, 1\), got 1.0"),
        (OK, FINE, {"clip_low": -0.1}, ValueError, r"clip_low must lie in \[0, 1\), got -0.1"),
        (OK, FINE, {"clip_high": -0.1}, ValueError, "clip_high must be >= 0 and finite, got -0.1"),
        (OK, FINE, {"clip_high": "0.1"}, TypeError, "clip_high must be a number, got str"),
        (OK, FINE, {"dual_clip": 1.0}, ValueError, "dual_clip must be > 1 or None, got 1.0"),
        (OK, FINE, {"dual_clip": True}, TypeError, "dual_clip must be a number, got bool"),
        (OK, FINE, {"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0.0"),
        (OK, FINE, {"temperature": math.nan}, ValueError, "temperature must be > 0 and finite, got nan"),
        (OK, FINE, {"row_weight": torch.ones(3)}, ValueError, r"row_weight must have shape \(2,\), got \(3,\)"),
        (OK, FINE, {"row_weight": torch.ones(2).long()}, TypeError, "row_weight must have dtype .*, got int64"),
        (OK, FINE, {"row_weight": [1.0, 1.0]}, TypeError, "row_weight must be a torch.Tensor or None, got list"),
        (
            OK,
            FINE,
            {"row_weight": torch.tensor([1, math.nan])},
            ValueError,
            "row_weight must not be NaN, got NaN in row 1",
        ),
        (OK[:, :0], FINE, {}, ValueError, "the vocabulary must have at least one token, got V = 0"),
    ],
)
def test_errors(
    backend: str, logits: Any, candidates: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dist_ppo_loss(logits, candidates, backend=backend, **options)
    with pytest.raises(error, match=message):
        dist_ppo_loss_and_grad(logits, candidates, backend=backend, **options)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_distribution(backend: str, dtype: torch.dtype) -> None:
    columns = 5000
    places = (2048,) if interpreted(backend) else (0, 2047, 2048, 4999)
    candidates = Candidates(torch.tensor([0, 1, 1, 2, 2]), torch.tensor([4, 5]), torch.zeros(2), torch.ones(2))
    for place in places:
        for value in (math.nan, math.inf):
            logits = torch.zeros(4, columns, dtype=dtype)
            logits[1] = logits[3] = math.nan  # rows without candidates
            dist_ppo_loss(logits, candidates, backend=backend)
            logits[2, place] = value
            with pytest.raises(ValueError, match=r"dist_ppo_loss: the logits .* must not be NaN.*: row 2"):
                dist_ppo_loss(logits, candidates, backend=backend)
            with pytest.raises(ValueError, match="row 2"):
                dist_ppo_loss_and_grad(logits, candidates, out=logits, backend=backend)
    logits = torch.zeros(4, columns, dtype=dtype)
    logits[0] = -math.inf
    with pytest.raises(ValueError, match="row 0"):
        dist_ppo_loss(logits, candidates, backend=backend)
    hidden, weight = torch.ones(4, 2, dtype=dtype), torch.ones(40, 2, dtype=dtype)
    hidden[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"linear_dist_ppo_loss: the logits .*: row 2"):
        linear_dist_ppo_loss(hidden, weight, candidates, backend=backend)


@each_backend
def test_errors_of_out(backend: str) -> None:
    def run(out: Any, logits: Tensor = OK) -> None:
        dist_ppo_loss_and_grad(logits, FINE, out=out, backend=backend)

    with pytest.raises(TypeError, match="out must have dtype float32, got float64"):
        run(OK.double())
    with pytest.raises(TypeError, match=r"out must be a torch\.Tensor, got list"):
        run([])
    with pytest.raises(ValueError, match=r"out must have shape \(2, 4\), got \(2, 5\)"):
        run(torch.zeros(2, 5))
    with pytest.raises(
        ValueError, match=r"out must have contiguous columns in rows of their own, got strides \(0, 1\)"
    ):
        run(torch.zeros(1, 4).expand(2, 4))
    with pytest.raises(ValueError, match="out must have contiguous columns"):
        run(torch.zeros(4, 2).T)
    held = torch.zeros(4, 2).T
    with pytest.raises(ValueError, match="logits must have contiguous columns"):
        run(held, held)
    memory = torch.zeros(20)
    with pytest.raises(ValueError, match="out must be the logits themselves or share no element"):
        run(memory[1:9].view(2, 4), memory[:8].view(2, 4))
    wide = torch.zeros(2, 7)
    with pytest.raises(ValueError, match="share no element"):
        run(wide[:, 3:], wide[:, :4])
    run(memory[8:16].view(2, 4), memory[:8].view(2, 4))


@each_backend
def test_errors_of_the_layer(backend: str) -> None:
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="weight must have width 3 like hidden, got 2"):
        linear_dist_ppo_loss(hidden, weight[:, :2], FINE, backend=backend)
    with pytest.raises(TypeError, match="weight must have dtype float32, got float64"):
        linear_dist_ppo_loss(hidden, weight.double(), FINE, backend=backend)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got list"):
        linear_dist_ppo_loss([], weight, FINE, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token_ids must be >= 0 and < V = 2, got 2 in entry 1"):
        linear_dist_ppo_loss(hidden, weight[:2], FINE, backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'gpu'"):
        dist_ppo_loss(OK, FINE, backend="gpu")


def test_gradients_reach_the_logits_alone() -> None:
    logits, candidates = inputs(3, 9, torch.float32)
    weight = torch.ones(3, requires_grad=True)
    fields = candidates._replace(policy_logp=candidates.policy_logp.clone().requires_grad_())
    loss = dist_ppo_loss(logits.requires_grad_(), fields, row_weight=weight)
    loss.backward()
    assert weight.grad is None
    assert fields.policy_logp.grad is None
    expected = truth(logits, candidates, row_weight=weight.detach())[1]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-7)
