"""linear_candidate_td: every backend against float64, blocks, survivors, errors."""

from __future__ import annotations

import math

import pytest
import torch

from prmfast.kernels.candidate_td import reference, tuning
from tests.ops.device import candidate_td, linear_candidate_td
from tests.ops.test_candidate_td import (
    INF,
    NAN,
    check,
    each_backend,
    each_dtype,
    interpreted,
    linear_inputs,
    log_softmax,
    row_of,
)


@each_backend
@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (3, 17), (5, 2047), (7, 2049), (4, 4099), (2051, 40)])
def test_linear_against_float64(backend: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    if interpreted(backend) and rows > 1000:
        pytest.skip("test_linear_in_small_blocks has several blocks of rows")
    made = linear_inputs(rows, columns, dtype)
    found = linear_candidate_td(**made, p_min=0.02, policy_temperature=1.5, backend=backend)
    policy = made["policy_hidden"].double() @ made["policy_weight"].double().T
    reward = made["reward_hidden"].double() @ made["reward_weight"].double().T
    if dtype == torch.float64:
        check(found, log_softmax(policy, 1.5), log_softmax(reward), p_min=0.02, sampled=made["sampled"])
        return
    truth = candidate_td(policy, reward, p_min=0.02, policy_temperature=1.5, sampled=made["sampled"])
    margin = log_softmax(policy, 1.5) - math.log(0.02) + reference.TOUCH
    assert margin.numel() == 0 or margin.abs().min() > 2e-5 or rows > 1000
    keys = [row_of(c) * columns + c.token_ids for c in (found, truth)]
    both = [torch.isin(keys[i], keys[1 - i]) for i in range(2)]
    for key, shared in zip(keys, both, strict=True):  # who is in one only stands at the threshold
        assert (margin.flatten()[key[~shared]].abs() < 2e-5).all()
    torch.testing.assert_close(found.policy_logp[both[0]].double(), truth.policy_logp[both[1]], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.advantage[both[0]].double(), truth.advantage[both[1]], rtol=1e-5, atol=4e-4)


SMALL_BLOCKS = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 64, "PRODUCT_ROWS": 4, "PRODUCT_COLUMNS": 64}


@each_backend
@pytest.mark.parametrize("p_min", [0.6, 0.02, 1e-3], ids=str)
def test_linear_in_small_blocks(backend: str, p_min: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and columns, the last ones shorter. Logits are small integers: every product is exact."""
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(tuning, name, value)
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randint(-2, 3, (6, 12), generator=g), torch.randint(-1, 2, (140, 12), generator=g)
    hidden[4] *= 3  # its candidates are few
    both = {"policy_hidden": hidden.float(), "reward_hidden": hidden.flip(0).bfloat16()}
    both |= {"policy_weight": weight.float(), "reward_weight": weight.flip(0).bfloat16()}
    policy, reward = (log_softmax((h @ w.T).double()) for h, w in ((hidden, weight), (hidden.flip(0), weight.flip(0))))
    for sampled in (None, torch.randint(0, 140, (6,), generator=g)):
        found = linear_candidate_td(**both, p_min=p_min, sampled=sampled, backend=backend)
        check(found, policy, reward, p_min=p_min, sampled=sampled)


@each_backend
@pytest.mark.parametrize("columns", [1, 10, 70, 255, 300])
def test_linear_equal_logits_touch_p_min(backend: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is a candidate in the end, and was one of fewer before: as many survivors as there can be."""
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(tuning, name, value)
    hidden, weight = torch.ones(2, 3), torch.full((columns, 3), 0.7)
    both = {"policy_weight": weight, "reward_weight": weight}
    found = linear_candidate_td(hidden, hidden, **both, p_min=1 / columns, backend=backend)
    assert found.offsets.tolist() == [0, columns, 2 * columns]
    assert found.token_ids.tolist() == 2 * list(range(columns))
    assert (found.advantage == 0).all()


@each_backend
def test_linear_survivors_that_do_not_last(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that rise along the vocabulary: each block replaces the survivors of the blocks before."""
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(tuning, name, value)
    rising = torch.linspace(0, 120, 400)[:, None]
    hidden = torch.tensor([[1.0], [0.5], [0.0], [-1.0]])
    found = linear_candidate_td(hidden, hidden, policy_weight=rising, reward_weight=-rising, backend=backend)
    policy = (hidden * rising.T).double()
    check(found, log_softmax(policy), log_softmax(-policy), p_min=0.1)
    assert found.offsets.tolist() == [0, 4, 7, 7, 11]


@each_backend
@pytest.mark.parametrize(("value", "kind"), [(NAN, "NaN"), (INF, r"\+inf"), (-INF, "only -inf")])
def test_linear_row_errors(backend: str, value: float, kind: str) -> None:
    made = linear_inputs(5, 2500, torch.float32)
    made["reward_weight"].abs_()
    made["reward_hidden"][3] = value
    with pytest.raises(ValueError, match=rf"linear_candidate_td: reward_logits .* got {kind} in row 3"):
        linear_candidate_td(**made, backend=backend)
