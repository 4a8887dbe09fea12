"""Helpers for tests of ops: inputs that exercise a room, an error budget against float64, and poisoned memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.picnn.params import CoefficientLayout, PicnnParams


def make_picnn(
    context_width: int, widths: tuple[int, ...], *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: object
) -> PicnnParams:
    """A random PICNN with hidden ``widths``, convex in x, with one head and no encoder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    full = (*widths, 1)
    size = CoefficientLayout(full).size - (0 if options.get("curvature") else 1)
    wz = tuple(normal(full[i + 1], full[i]).abs() / full[i] for i in range(len(widths)))
    return PicnnParams(wz=wz, heads=((normal(size, context_width) / context_width**0.5, normal(size)),), **options)  # type: ignore[arg-type]


def make_candidates(
    policy_logits: Tensor, *, p_min: float = 0.1, every: int | None = None, seed: int = 0
) -> Candidates:
    """The tokens of probability >= ``p_min`` in every row of ``policy_logits`` [T, V], with normal advantages; none in
    the last of ``every`` so many rows.
    """
    logp = policy_logits.double().log_softmax(1)
    chosen = logp.exp() >= p_min
    if every is not None:
        chosen[every - 1 :: every] = False
    rows, token_ids = chosen.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    generator = torch.Generator().manual_seed(seed)
    advantage = torch.randn(len(token_ids), generator=generator, dtype=torch.float64)
    return Candidates(offsets, token_ids, logp[rows, token_ids], advantage)


def make_inputs(
    room: str, rows: int, columns: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, object]:
    """Keyword arguments of the room's op for ``rows`` contexts or questions and ``columns`` levels or quantiles.

    picnn: params, context [rows, 5], levels [rows, columns] in [0, 1]. ias: quantiles [rows, columns], some of them
    exactly 0, 1 and outside [0, 1]; target [rows]; n_max 64. candidate_td: policy_logits and reward_logits
    [rows, columns], some of them -inf; sampled [rows]. dist_ppo: logits [rows, columns] and candidates of another
    policy, none in every third row.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    if room == "picnn":
        context = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        params = make_picnn(5, (9, 6), dtype=dtype, seed=seed, curvature=True)
        return {"params": params, "context": context.to(dtype), "levels": uniform.to(dtype)}
    if room == "ias":
        quantiles = (1.2 * uniform - 0.1).round(decimals=2).sort(1).values
        target = 0.5 + 0.499 * torch.rand(rows, generator=generator, dtype=torch.float64)
        return {"quantiles": quantiles.to(dtype), "target": target, "n_max": 64}
    if room == "candidate_td":
        policy = 4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        reward = policy + torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        policy[:, 1:][uniform[:, 1:] < 0.1] = -torch.inf
        sampled = torch.randint(0, columns, (rows,), generator=generator)
        return {"policy_logits": policy.to(dtype), "reward_logits": reward.to(dtype), "sampled": sampled}
    if room == "dist_ppo":
        old = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        likely = torch.randint(columns, (rows, 2), generator=generator)
        old.scatter_(1, likely, math.log(columns) + torch.rand(rows, 2, generator=generator, dtype=torch.float64))
        logits = old + 0.4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return {"logits": logits.to(dtype), "candidates": make_candidates(old, every=3, seed=seed)}
    raise ValueError(f"room must be 'picnn', 'ias', 'candidate_td' or 'dist_ppo', got {room!r}")


def assert_within_budget(fast: Tensor, *, truth: Tensor, same_dtype: Tensor | None = None, slack: float = 1e-5) -> None:
    """``fast`` may not be further from the float64 ``truth`` than plain torch in the same dtype, plus ``slack`` of
    truth's scale.

    Compared row by row over the first dimension; the error names the first row that breaks the budget.
    """
    if fast.shape != truth.shape:
        raise AssertionError(f"fast must have shape {tuple(truth.shape)}, got {tuple(fast.shape)}")
    if truth.numel() == 0:
        return
    rows = truth.shape[0] if truth.ndim else 1
    error = (fast.double() - truth.double()).abs().reshape(rows, -1).amax(1)
    allowed = slack * truth.double().abs().reshape(rows, -1).amax(1).clamp_min(truth.double().abs().mean())
    if same_dtype is not None:
        allowed = allowed + (same_dtype.double() - truth.double()).abs().reshape(rows, -1).amax(1)
    bad = ~(error <= allowed)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise AssertionError(f"row {row}: error {float(error[row]):.3e} exceeds the budget {float(allowed[row]):.3e}")


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fills uninitialised memory that torch hands out with NaN, so that an output nobody wrote shows."""
    from torch.utils import deterministic

    algorithms = torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
