"""Inputs of the benchmarks: fixed seeds, and values such as a user has them rather than plain noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from prmfast.calibration.picnn import ConditionalPicnn

HIDDEN, ENCODER, WIDTH, DEPTH = 3584, (256, 64), 64, 4

Function = TypeVar("Function", bound=Callable[..., Any])


def _placed(make: Function) -> Function:
    """What ``make`` makes on the CPU, the same for every device, on the caller's default device."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = torch.get_default_device()
        with torch.device("cpu"):
            found = make(*args, **kwargs)
        return tuple(t.to(device) for t in found) if isinstance(found, tuple) else found.to(device)

    return cast(Function, made)


@_placed
def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@_placed
def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@_placed
def ids(count: int, vocabulary: int, seed: int) -> Tensor:
    """Token ids, int64 [count]."""
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


@_placed
def quantiles(rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] float32, each row the sorted draws of a beta law of its own; budgets from 1 to N max occur."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.02, 0.98, (rows, 1))
    concentration = np.exp(rng.uniform(np.log(0.5), np.log(20.0), (rows, 1)))
    drawn = rng.beta(mean * concentration, (1 - mean) * concentration, (rows, columns))
    return torch.from_numpy(np.sort(drawn, 1).astype(np.float32))


def levels(count: int) -> Tensor:
    """Midpoints of ``count`` equal parts of [0, 1]."""
    return (torch.arange(count) + 0.5) / count


@_placed
def picnn_model(hidden: int = HIDDEN) -> ConditionalPicnn:
    """A calibrator's network as its fit starts it, with a head that really depends on the context."""
    from prmfast.calibration.picnn import ConditionalPicnn, beta_quantiles

    generator = torch.Generator().manual_seed(0)
    model = ConditionalPicnn(hidden, encoder=ENCODER, dropout=0.0, width=WIDTH, depth=DEPTH)
    rng = np.random.default_rng(0)
    successes = rng.binomial(8, rng.beta(0.8, 0.8, 2000)).astype(np.float64)
    model.initialise(beta_quantiles(successes, np.full(2000, 8.0)), generator=generator)
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


def contexts(rows: int, hidden: int = HIDDEN) -> Tensor:
    """[rows, hidden] standardised hidden states."""
    return normal(rows, hidden, seed=1)


@_placed
def logits(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and reward logits [rows, vocabulary]: noise, and up to six likely tokens a row; some rows have none."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.empty(rows, vocabulary, dtype=dtype)
    reward = torch.empty(rows, vocabulary, dtype=dtype)
    spikes = torch.randint(0, 7, (rows,), generator=generator).tolist()
    for row in range(rows):  # no second matrix at any time
        values = torch.randn(vocabulary, generator=generator) * 2
        count = min(spikes[row], vocabulary)
        where = torch.randint(0, vocabulary, (count,), generator=generator)
        values[where] = 13 + 4 * torch.rand(count, generator=generator)
        policy[row] = values
        reward[row] = values + torch.randn(vocabulary, generator=generator) * 0.5
    return policy, reward


@_placed
def linear(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and lm_head weights of policy and reward model, [rows, width] and [vocabulary, width] each.

    A row's hidden state points at up to six tokens, so that there are candidates.
    """
    generator = torch.Generator().manual_seed(0)
    policy_weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    reward_weight = policy_weight + 0.1 * torch.randn(vocabulary, width, generator=generator) / width**0.5
    hidden = torch.randn(rows, width, generator=generator)
    for row in range(rows):
        for token in torch.randint(0, vocabulary, (row % 7,), generator=generator).tolist():
            hidden[row] += 14 * policy_weight[token] * (0.8 + 0.2 * torch.rand(1, generator=generator))
    return hidden, hidden + 0.05 * torch.randn(rows, width, generator=generator), policy_weight, reward_weight
