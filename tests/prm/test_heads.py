"""Score heads: recorded numbers, the full product they stand for, and what a quantile head starts from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prmfast.prm.heads import (
    ProcessRewardHead,
    QuantileHead,
    ReasonEvalHead,
    StepHead,
    TokenPairHead,
    ValueHead,
)
from tests.vectors import Vectors, assert_relative

WIDTH = 16
HEADS = {
    "process": lambda: ProcessRewardHead(WIDTH),
    "reasoneval": lambda: ReasonEvalHead(WIDTH, bias=True),
    "pair": lambda: TokenPairHead(WIDTH, (3, 7)),
    "value": lambda: ValueHead(WIDTH),
}


def random_head(name: str, seed: int = 0) -> StepHead:
    generator = torch.Generator().manual_seed(seed)
    head = HEADS[name]().double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def states(seed: int = 1, rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_step_rewards_of_the_released_qwen_code(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "calprm_qwen_steps.npz")
    head = ProcessRewardHead(WIDTH)
    for case in vectors.cases:
        given = vectors.inputs(case)
        found = head.probability(given["logits"][given["mask"]])
        torch.testing.assert_close(found, vectors.outputs(case)["scores"], rtol=1e-12, atol=0)


@torch.no_grad()
def test_quantile_head_starts_where_the_released_one_does(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "calprm_head_init.npz")
    for case in vectors.cases:
        given, expected = vectors.inputs(case), vectors.outputs(case)
        base = ProcessRewardHead(given["x"].shape[1]).double()
        with torch.no_grad():
            base.score[2].weight.copy_(given["W"])
            base.score[2].bias.copy_(given["b"])
        made = QuantileHead.from_head(base, case["params"]["M"])
        torch.testing.assert_close(made.quantiles.weight.data, expected["Wq"], rtol=0, atol=0)
        torch.testing.assert_close(made.quantiles.bias.data, expected["bq"], rtol=0, atol=0)
        assert_relative(made.quantiles(given["x"]).sigmoid(), expected["score_after"], 1e-12)
        assert_relative(base.probability(base.score[2](given["x"])), expected["score_before"], 1e-12)


@pytest.mark.parametrize("name", ["process", "pair", "value"])
@torch.no_grad()
def test_every_quantile_starts_at_the_base_probability(name: str) -> None:
    base, hidden = random_head(name), states()
    expected = base.probability(base(hidden))
    before = copy.deepcopy(base.state_dict())
    made = QuantileHead.from_head(base, 5)
    logits = made(hidden)
    assert_relative(logits.sigmoid(), expected[:, None].expand(-1, 5), 1e-12)
    assert_relative(made.probability(logits), expected, 1e-12)
    for parameter in made.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@torch.no_grad()
def test_the_quantile_head_of_reasoneval_starts_at_its_mean_log_odds() -> None:
    base, hidden = random_head("reasoneval"), states()
    logits = base(hidden)
    expected = ((logits[:, 1] - logits[:, 0] + logits[:, 2] - logits[:, 0]) / 2).sigmoid()
    assert_relative(QuantileHead.from_head(base, 3)(hidden).sigmoid(), expected[:, None].expand(-1, 3), 1e-12)
    assert bool((expected < base.probability(logits)).all())  # what the average leaves out


def test_point_estimate_is_the_median_column() -> None:
    head = QuantileHead(nn.Identity(), 1, 3)
    logits = torch.tensor([[-1.0, 0.5, 2.0]])
    assert head.probability(logits).item() == pytest.approx(torch.tensor(0.5).sigmoid().item())
    assert QuantileHead(nn.Identity(), 1, 4).probability(torch.tensor([[0.0, 1.0, 2.0, 3.0]])).item() == pytest.approx(
        torch.tensor(1.0).sigmoid().item()
    )


@torch.no_grad()
def test_token_pair_is_the_softmax_of_two_columns_of_the_full_product() -> None:
    table, hidden = torch.randn(11, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), states()
    head = TokenPairHead(WIDTH, (3, 7)).double()
    head.load({"lm_head.weight": table, "model.norm.weight": torch.ones(WIDTH)})
    expected = (hidden @ table.T)[:, [3, 7]].softmax(-1)[:, 0]
    assert_relative(head.probability(head(hidden)), expected, 1e-12)
    tied = TokenPairHead(WIDTH, (3, 7), tied=True).double()
    assert tied.checkpoint_names == ("model.embed_tokens.weight",)
    tied.load({"model.embed_tokens.weight": table})
    assert torch.equal(tied.weight, head.weight)


def test_reasoneval_scores() -> None:
    head, logits = ReasonEvalHead(WIDTH), torch.tensor([[0.0, 1.0, 2.0], [9.0, -9.0, -9.0]], dtype=torch.float64)
    p = logits.softmax(-1)
    assert_relative(head.probability(logits), p[:, 1] + p[:, 2], 1e-12)
    assert_relative(head.redundancy(logits), p[:, 1], 1e-12)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("process", {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}),
        ("reasoneval", {"score_head.weight", "score_head.bias"}),
        ("pair", {"lm_head.weight"}),
        ("value", {"v_head.summary.weight", "v_head.summary.bias"}),
    ],
)
def test_the_checkpoint_names_are_the_released_ones(name: str, names: set[str]) -> None:
    assert set(HEADS[name]().checkpoint_names) == names


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_states_are_scored_in_the_heads_dtype(name: str) -> None:
    head = random_head(name).float()
    hidden = states().bfloat16()
    logits = head(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(hidden.float()))
    assert head.probability(logits.bfloat16()).dtype == torch.float32


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return lambda: function(*args, **kwargs)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (call(ValueHead(4).load, {}), KeyError, "needs the tensor 'v_head.summary.weight'"),
        (
            call(ProcessRewardHead(4).load, {"score.0.weight": torch.zeros(5, 5)}),
            ValueError,
            r"'score.0.weight' must have shape \(4, 4\), got \(5, 5\)",
        ),
        (call(TokenPairHead(4, (1, 9)).load, {"lm_head.weight": torch.zeros(9, 4)}), ValueError, "9 rows, token 9"),
        (call(TokenPairHead, 4, (1, 1)), ValueError, r"two different tokens \(good, bad\), got \(1, 1\)"),
        (call(QuantileHead, nn.Identity(), 4, 0), ValueError, "quantiles must be at least 1, got 0"),
        (call(QuantileHead.from_head, nn.Linear(2, 2), 3), TypeError, "head must be a StepHead .* got Linear"),
        (
            call(QuantileHead.from_head, QuantileHead(nn.Identity(), 4, 2), 3),
            TypeError,
            "one probability, got QuantileHead",
        ),
    ],
)
def test_errors_say_what_is_wrong(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bad()
