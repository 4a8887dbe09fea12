"""Room dist_ppo's CUDA kernels and their adapter, emulated, against the formula in float64."""

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

from prmfast.kernels.dist_ppo import reference
from prmfast.kernels.dist_ppo.reference import Rule
from prmfast.ops import Candidates
from prmfast.testing import make_candidates
from tests.cuda.adapters import adapter, guarded, guarded_copy
from tests.cuda.library import Launched, Library, build
from tests.ops.test_dist_ppo import OPTIONS, assert_gradient, assert_loss, entry_rows, inputs, single, truth

pytestmark = pytest.mark.xdist_group("emulated_dist_ppo")  # the library is compiled once
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# What a block may hold, in segments of 2048 logits: nothing of them fits into the smallest.
HOLDS = {"nothing": 0.2, "two": 2.1, "all": 50.0}


@pytest.fixture(scope="module")
def library() -> Library:
    return build("dist_ppo", "csrc/dist_ppo/dist_ppo_cuda.cu", "tests/cuda/dist_ppo_shim.cpp")


@pytest.fixture
def cuda(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    library.on(90)
    module = adapter(library, "dist_ppo")
    monkeypatch.setattr(torch, "empty", functools.partial(guarded, library))
    return module


def rule_of(clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None, **more: float) -> Rule:
    return Rule(clip_low, clip_high, dual_clip, more.get("temperature", 1.0))


def equal_weights(rows: int, value: float = 0.0) -> Tensor:
    return torch.full((1,), value or 1 / max(rows, 1), dtype=torch.float64).expand(rows)


class Calls:
    """The adapter on guarded copies of the logits."""

    def __init__(self, cuda: ModuleType, library: Library, candidates: Candidates, rule: Rule, weight: Tensor) -> None:
        self.cuda, self.library = cuda, library
        self.candidates, self.rule, self.weight = candidates, rule, weight

    def apart(self, logits: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Loss and gradient by the forward and the backward function."""
        held = guarded_copy(self.library, logits, shift)
        loss, lse, coefficients = self.cuda.dist_ppo(held, self.candidates, self.weight, self.rule)
        entries = self.candidates.offsets, self.candidates.token_ids
        temperature = self.rule.temperature
        return loss, self.cuda.dist_ppo_backward(
            held, *entries, lse=lse, coefficients=coefficients, temperature=temperature
        )

    def together(self, logits: Tensor, shift: int = 0, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """By the function that does both."""
        held = guarded_copy(self.library, logits, shift)
        out = held if in_place else guarded(self.library, *logits.shape, dtype=logits.dtype)
        loss, _ = self.cuda.dist_ppo_with_grad(held, self.candidates, self.weight, self.rule, out=out)
        return loss, out


@each_dtype
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 2047, 2049, 4099])
@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "dual", "shut"])
def test_loss_and_gradient_are_the_formula(
    cuda: ModuleType, library: Library, dtype: torch.dtype, columns: int, options: dict[str, Any]
) -> None:
    logits, candidates = inputs(5, columns, dtype)
    if columns == 1 and options.get("clip_low") == 0.0:
        pytest.skip("rho = 1 at a clip of 0: every entry is a tie, see test_ties")
    weight = torch.full((5,), 100.0 if dtype == torch.float16 else 0.2, dtype=torch.float64)
    expected, grad = truth(logits, candidates, row_weight=weight, **options)
    calls = Calls(cuda, library, candidates, rule_of(**options), weight)
    loss, fresh = calls.apart(logits)
    assert_loss(loss.float(), expected, candidates, weight)
    assert_gradient(fresh, grad)
    for in_place in (False, True):
        again, both = calls.together(logits, in_place=in_place)
        assert torch.equal(again, loss)
        assert torch.equal(both, fresh)


@each_dtype
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("capability", "multiprocessors"), [(80, 4), (90, 1), (90, 1000)])
def test_every_plan_gives_the_same_bits(
    cuda: ModuleType, library: Library, dtype: torch.dtype, hold: str, capability: int, multiprocessors: int
) -> None:
    """Blocks alone, clusters of every size, rows that fit into shared memory in part or not at all; any alignment."""
    columns = 9 * 2048 + 77
    logits, _ = inputs(3, columns, dtype, seed=3)
    candidates = make_candidates(logits / 1.5 - 0.1 * logits.roll(1, 0), p_min=0.02, every=3)
    assert candidates.offsets.diff().max() > 1
    calls = Calls(cuda, library, candidates, rule_of(), equal_weights(3, 50.0))
    loss, grad = calls.apart(logits)
    segment = 2048 * dtype.itemsize
    shared = int(HOLDS[hold] * segment) + 200
    for shift in (0, 1):
        for backwards in (False, True):
            library.on(capability, shared_bytes=shared, multiprocessors=multiprocessors, backwards=backwards)
            for in_place in (False, True):
                again, both = calls.together(logits, shift, in_place=in_place)
                assert torch.equal(again, loss)
                assert torch.equal(both, grad)
    found = library.launches[-1]
    assert found.shared_bytes <= shared
    wide = capability == 90 and (hold != "all" or multiprocessors > 1)
    assert found.cluster == (8 if wide else 1)
    assert found.blocks == 3 * found.cluster


@pytest.mark.parametrize(
    ("dtype", "segments", "cluster"),
    [(torch.bfloat16, 24, 1), (torch.bfloat16, 40, 2), (torch.bfloat16, 75, 4), (torch.float32, 75, 8)],
    ids=str,
)
def test_a_row_that_fits_is_read_and_written_once(
    cuda: ModuleType, library: Library, dtype: torch.dtype, segments: int, cluster: int
) -> None:
    """On an H100's shared memory; two blocks fit on a multiprocessor."""
    columns = segments * 2048
    logits = torch.linspace(-3, 3, columns).roll(5)[None].repeat(2, 1).to(dtype)
    offsets = torch.tensor([0, 2, 2])
    candidates = Candidates(offsets, torch.tensor([1, 2050]), torch.tensor([-9.0, -9.0]), torch.tensor([-1.0, -2.0]))
    calls = Calls(cuda, library, candidates, rule_of(), equal_weights(2))
    library.on(90, multiprocessors=1)
    _, grad = calls.together(logits, in_place=True)
    row = columns * dtype.itemsize
    assert library.bytes_read == row  # the row without candidates is not read
    assert library.bytes_written == 2 * row
    (found,) = library.launches
    assert found == Launched(2 * cluster, 256, cluster, found.shared_bytes)
    assert 2 * (found.shared_bytes + 1024) <= 228 * 1024
    assert (grad[1] == 0).all()
    assert grad[0].isfinite().all()


@each_dtype
def test_rows_alone_have_the_same_bits(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    logits, candidates = inputs(12, 3001, dtype)
    weight = torch.ones(12)
    _, grad = Calls(cuda, library, candidates, rule_of(), weight).apart(logits)
    _, both = Calls(cuda, library, candidates, rule_of(), weight).together(logits)
    assert torch.equal(both, grad)
    for row in range(12):
        begin, end = candidates.offsets[row : row + 2].tolist()
        one = Candidates(torch.tensor([0, end - begin]), *(field[begin:end] for field in candidates[1:]))
        alone = Calls(cuda, library, one, rule_of(), weight[:1])
        assert torch.equal(alone.apart(logits[row : row + 1])[1], grad[row : row + 1])
        assert torch.equal(alone.together(logits[row : row + 1])[1], grad[row : row + 1])


def test_a_row_of_entries_only(cuda: ModuleType, library: Library) -> None:
    """More entries than lanes, in every place of a segment."""
    logits, _ = inputs(2, 300, torch.float32)
    logits = logits.clamp(-4, 4)
    candidates = make_candidates(logits - 0.2 * logits.roll(1, 0), p_min=1e-9, every=1000)
    assert len(candidates.token_ids) == 600
    weight = equal_weights(2)
    expected, grad = truth(logits, candidates)
    calls = Calls(cuda, library, candidates, rule_of(), weight)
    loss, fresh = calls.apart(logits)
    assert_loss(loss.float(), expected, candidates)
    assert_gradient(fresh, grad)
    assert torch.equal(calls.together(logits, in_place=True)[1], fresh)


@each_dtype
def test_strides_and_places(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    base, _ = inputs(8, 700, dtype)
    for view in (base[::2, 3:340], base[:4, ::2], base[:4, :300].t().contiguous().t(), base[:1, :90].expand(4, 90)):
        logits = view
        candidates = make_candidates(logits / 1.5 - 0.1 * logits.roll(1, 0), p_min=0.05, every=3)
        weight = torch.rand(4) * 200 + 1
        expected, grad = truth(logits, candidates, row_weight=weight)
        loss, lse, coefficients = cuda.dist_ppo(logits, candidates, weight, rule_of())
        assert_loss(loss.float(), expected, candidates, weight)
        entries = candidates.offsets, candidates.token_ids
        fresh = cuda.dist_ppo_backward(logits, *entries, lse=lse, coefficients=coefficients, temperature=1.0)
        left = 1e-14 * float(weight.sum() * candidates.advantage.abs().sum())
        assert_gradient(fresh, grad, left=left)
        wide = torch.full((8, logits.shape[1] + 9), 7.0, dtype=dtype)
        out = wide[::2, 5 : 5 + logits.shape[1]]
        cuda.dist_ppo_with_grad(logits, candidates, weight, rule_of(), out=out)
        assert torch.equal(out, fresh)
        assert (wide[1::2] == 7).all()
        assert (wide[:, :5] == 7).all()
        assert (wide[:, 5 + logits.shape[1] :] == 7).all()


@each_dtype
def test_no_rows_and_no_candidates(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    none = Candidates(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), *torch.zeros(2, 0))
    for loss, grad in (
        Calls(cuda, library, none, rule_of(), equal_weights(0)).apart(torch.zeros(0, 5, dtype=dtype)),
        Calls(cuda, library, none, rule_of(), equal_weights(0)).together(torch.zeros(0, 5, dtype=dtype)),
    ):
        assert loss.item() == 0
        assert grad.shape == (0, 5)
    assert library.launches == []
    rows = torch.full((3, 70), math.nan, dtype=dtype)  # not read
    calls = Calls(cuda, library, none._replace(offsets=torch.zeros(4, dtype=torch.int64)), rule_of(), equal_weights(3))
    for loss, grad in (calls.apart(rows), calls.together(rows), calls.together(rows, in_place=True)):
        assert loss.item() == 0
        assert (grad == 0).all()


def test_ties(cuda: ModuleType, library: Library) -> None:
    """Powers of two, so that every product is exact: four equal logits, rho = 1 and rho = 2 exactly."""
    logits = torch.zeros(6, 4)
    old = torch.tensor([0.25, 0.25, 0.125, 0.125, 0.25, 0.25], dtype=torch.float64).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    candidates = Candidates(torch.arange(7), torch.tensor([0, 1, 2, 3, 0, 1]), old, advantage)
    for rule in (Rule(0.0, 0.0, None, 1.0), Rule(0.0, 1.0, None, 1.0), Rule(0.5, 0.0, 2.0, 1.0)):
        leaf = logits.double().requires_grad_()
        new = leaf.log_softmax(1)[entry_rows(candidates), candidates.token_ids]
        term = reference.terms(new, candidates, rule)
        (expected,) = torch.autograd.grad(-term.sum() / 6, leaf)
        calls = Calls(cuda, library, candidates, rule, equal_weights(6))
        loss, grad = calls.apart(logits)
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-7)
        assert float(loss) == pytest.approx(-float(term.detach().sum()) / 6, abs=1e-16)
        assert torch.equal(calls.together(logits)[1], grad)


@each_dtype
def test_a_lone_token_is_certain(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.3], [-200.0], [5.0]], dtype=dtype)
    candidates = Candidates(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0]), torch.zeros(2), torch.tensor([0.5, -2.0]))
    loss, grad = Calls(cuda, library, candidates, rule_of(), equal_weights(3)).apart(logits)
    assert float(loss) == pytest.approx(0.5)
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_masked_tokens(cuda: ModuleType, library: Library, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, :4200] = -math.inf  # whole segments of them, at the beginning
    logits[0, 4300:4400] = torch.finfo(dtype).min
    for token in (4250, 3):  # rho = 0 for the second one
        for advantage in (1.0, -1.0):
            candidates = single(token, -7.0, advantage)
            expected, grad = truth(logits, candidates)
            calls = Calls(cuda, library, candidates, rule_of(), equal_weights(1))
            loss, fresh = calls.apart(logits)
            assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-12)
            assert_gradient(fresh, torch.nan_to_num(grad, nan=0.0))
            assert (fresh[0, :4200] == 0).all()
            assert torch.equal(calls.together(logits)[1], fresh)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4, 1e6])
def test_logits_far_from_zero(cuda: ModuleType, library: Library, dtype: torch.dtype, offset: float) -> None:
    logits, candidates = inputs(4, 4500, torch.float64)
    logits = (logits + offset).to(dtype)
    logits[0, 4000:] += 700
    logits[1, :2100] += 30
    expected, grad = truth(logits, candidates)
    calls = Calls(cuda, library, candidates, rule_of(), equal_weights(4))
    loss, fresh = calls.apart(logits)
    assert float(loss) == pytest.approx(float(expected), rel=3e-6, abs=1e-9)
    assert_gradient(fresh, grad)
    assert torch.equal(calls.together(logits)[1], fresh)


@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [2, 2500, 4000])
def test_rows_without_a_distribution_are_told(
    cuda: ModuleType, library: Library, dtype: torch.dtype, value: float, column: int
) -> None:
    logits = torch.zeros(3, 4100, dtype=dtype)
    logits[1, column if value != -math.inf else slice(None)] = value
    ids = torch.tensor([7, 2500, 9])  # the one in the row is bad itself, or another one is
    candidates = Candidates(torch.arange(4), ids, torch.full((3,), -9.0), torch.full((3,), -1.0))
    good = Calls(cuda, library, candidates, rule_of(), equal_weights(3)).apart(torch.zeros(3, 4100, dtype=dtype))[1]
    _, lse, _ = cuda.dist_ppo(logits, candidates, equal_weights(3), rule_of())
    assert lse.isfinite().tolist() == [True, False, True]
    out = guarded(library, 3, 4100, dtype=dtype)
    _, lse = cuda.dist_ppo_with_grad(logits, candidates, equal_weights(3), rule_of(), out=out)
    assert lse.isfinite().tolist() == [True, False, True]
    assert torch.equal(out[::2], good[::2])


def test_huge_ratios_and_impossible_entries(cuda: ModuleType, library: Library) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    p = float(logits.double().softmax(1)[0, 2])
    for policy_logp in (-90.0, -800.0, -1e30):
        for advantage, dual, expected in ((3.0, None, 0.0), (-3.0, None, 3 * p), (-3.0, 3.0, 0.0)):
            calls = Calls(cuda, library, single(2, policy_logp, advantage), rule_of(dual_clip=dual), equal_weights(1))
            loss, grad = calls.together(logits)
            assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-37)
            assert grad[0, 2].item() == pytest.approx(expected * (1 - p), rel=1e-6)
    loss, grad = Calls(cuda, library, single(2, -math.inf, math.inf), rule_of(), equal_weights(1)).together(logits)
    assert loss.item() == 0
    assert (grad == 0).all()


def test_the_signatures_are_the_references(cuda: ModuleType) -> None:
    for name in cuda.__all__:
        assert (
            inspect.signature(getattr(cuda, name)).parameters == inspect.signature(getattr(reference, name)).parameters
        )
