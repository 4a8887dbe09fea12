"""The pooler in vLLM's worker gives what transformers and the calibrators give outside of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from vllm import PoolingParams

from prmfast.calibration import load_calibrator
from prmfast.calibration.judging import step_features
from prmfast.ops import ias_budget
from prmfast.prm import AutoPRM, ValueHeadPRM
from prmfast.vllm import VLLMPRM, RowFormat, StepRequest, prm_engine_args
from prmfast.vllm.settings import BUDGET_LEVELS, PRMSettings, level_values
from tests.vllm import calibrators
from tests.vllm.conftest import ANSWER, KINDS, QUESTION, STEPS

ANSWERS = [ANSWER, None, "\n\n".join(STEPS[:2]), "", STEPS[0], ANSWER, "\n\n".join((STEPS[0], STEPS[2]))]
Checkpoint = Callable[[str], str]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_hidden_states_are_those_of_transformers(
    kind: str, start_llm: Callable[..., Any], checkpoint: Checkpoint
) -> None:
    llm = start_llm(**prm_engine_args(checkpoint(kind)))
    assert llm.llm_engine.model_config.architectures == [KINDS[kind]]
    ours, reference = VLLMPRM(llm), AutoPRM.from_pretrained(checkpoint(kind), dtype=torch.float32)
    assert ours.prm_id == reference.prm_id
    found, expected = ([s.scores for s in prm.judge([QUESTION] * 7, ANSWERS)] for prm in (ours, reference))
    assert [len(scores) for scores in found] == [4, 1, 2, 0, 1, 4, 2]
    assert len({round(score, 3) for scores in found for score in scores}) > 4  # they tell steps apart
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert ours.score([QUESTION], [[ANSWER, ""]]) == [[list(found[0]), []]]
    for mine, theirs in zip(
        ours.features([QUESTION], [[ANSWER, "", STEPS[0]]])[0],
        reference.features([QUESTION], [[ANSWER, "", STEPS[0]]])[0],
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours.question_state([QUESTION]), reference.question_state([QUESTION]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def whole_pass(llm: Any, chain: Any, **request: Any) -> Tensor:
    params = PoolingParams(
        skip_reading_prefix_cache=True,
        extra_kwargs=StepRequest(positions=list(chain.step_positions), **request).extra_kwargs(),
    )
    prompt = {"prompt_token_ids": list(chain.token_ids)}
    return llm.encode([prompt], params, pooling_task="token_classify", use_tqdm=False)[0].outputs.data


def test_plain_requests_find_the_step_tokens_by_themselves(prm_llm: Any) -> None:
    prm = VLLMPRM(prm_llm)
    expected = prm.judge([QUESTION, QUESTION], [ANSWER, None])
    adapter = prm._scoring.adapter
    texts = [adapter.text(QUESTION, STEPS), adapter.text(QUESTION, []), "no step in here"]
    outputs = prm_llm.encode(texts, pooling_task="token_classify", use_tqdm=False)
    assert [tuple(output.outputs.data.shape) for output in outputs] == [(4, 2), (1, 2), (0, 2)]
    for output, scores in zip(outputs, expected, strict=False):
        positions, found = output.outputs.data.T
        assert found.tolist() == pytest.approx(scores.scores, abs=1e-6)
        ids = torch.tensor(output.prompt_token_ids)[positions.long()]
        assert ids.tolist() == [adapter.step_token_id(prm._scoring.tokenizer)] * len(scores.scores)


def test_a_prompt_in_pieces_gives_the_rows_of_the_whole(
    prm_llm: Any, start_llm: Callable[..., Any], checkpoint: Checkpoint
) -> None:
    small = start_llm(**prm_engine_args(checkpoint("qwen"), max_num_batched_tokens=64))
    assert small.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
    answers = [ANSWER, "\n\n".join(STEPS[::-1]), None]
    whole, pieces = VLLMPRM(prm_llm), VLLMPRM(small)
    assert len(whole._scoring.chain(QUESTION, ANSWER).encoded.token_ids) > 4 * 64
    for mine, theirs in zip(pieces.judge([QUESTION] * 3, answers), whole.judge([QUESTION] * 3, answers), strict=True):
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-6)
    for mine, theirs in zip(
        pieces.features([QUESTION], [answers[:2]])[0], whole.features([QUESTION], [answers[:2]])[0], strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def calibrated(start_llm: Callable[..., Any], checkpoint: Checkpoint, tmp_path_factory: Any) -> tuple[Any, Any]:
    """An engine with three calibrators, and their folders by name."""
    root: Path = tmp_path_factory.mktemp("calibrators")
    folders = {kind: calibrators.save(root, kind) for kind in ("hidden", "features", "score")}
    return start_llm(**prm_engine_args(checkpoint("qwen"), calibrator=folders, levels=[0.25, 0.5])), folders


@pytest.mark.parametrize("kind", ["hidden", "features", "score"])
@pytest.mark.parametrize("empty", [False, True], ids=["steps", "empty answer"])
def test_quantiles_means_and_budgets_are_those_of_the_calibrator(
    calibrated: tuple[Any, dict[str, str]], kind: str, empty: bool
) -> None:
    llm, folders = calibrated
    chain = VLLMPRM(llm)._scoring.chain(QUESTION, None if empty else ANSWER).encoded
    request = StepRequest(calibrator=kind, levels=[0.05, 0.5, 0.9], targets=[0.5, 0.99], n_max=32, hidden=True)
    form = RowFormat.of(request, PRMSettings.of(llm.llm_engine.vllm_config.additional_config), 64)
    rows = form.split(whole_pass(llm, chain, empty=empty, **request.model_dump(exclude={"positions", "empty"})))
    assert rows.positions.tolist() == list(chain.step_positions)
    assert rows.hidden is not None

    calibrator = load_calibrator(folders[kind])
    data = calibrators.CalibrationData.from_arrays(
        score=rows.scores,
        features=step_features(rows.scores.tolist(), empty=empty),
        feature_names=calibrators.FEATURE_NAMES,
        hidden=rows.hidden,
        successes=[0] * len(rows.scores),
    )
    torch.testing.assert_close(rows.quantiles, calibrator.quantile(data, [0.05, 0.5, 0.9]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.expected, calibrator.expected(data), rtol=1e-5, atol=1e-6)
    midpoints = calibrator.quantile(data, level_values(BUDGET_LEVELS))
    budgets = [ias_budget(midpoints, target, 32).tolist() for target in (0.5, 0.99)]
    assert rows.budgets is not None
    assert rows.budgets.T.tolist() == budgets
    assert len(set(budgets[1])) + len(set(budgets[0])) > 1 or empty


def test_without_a_name_the_first_calibrator_answers_at_the_configured_levels(
    calibrated: tuple[Any, dict[str, str]],
) -> None:
    llm, _ = calibrated
    chain = VLLMPRM(llm)._scoring.chain(QUESTION, ANSWER).encoded
    torch.testing.assert_close(
        whole_pass(llm, chain), whole_pass(llm, chain, calibrator="hidden", levels=[0.25, 0.5]), rtol=0, atol=0
    )
    assert whole_pass(llm, chain, calibrator=None).shape == (4, 2)
    raw = whole_pass(llm, chain, calibrator=None, targets=[0.9], n_max=64)
    assert raw[:, 2].tolist() == ias_budget(raw[:, 1:2], 0.9, 64).tolist()  # the score as the one quantile
    assert VLLMPRM(llm, levels=8).judge([QUESTION], [ANSWER])[0].quantiles.shape == (4, 8)
    assert VLLMPRM(llm, calibrator=None).judge([QUESTION], [ANSWER])[0].quantiles is None


class MyPRM(ValueHeadPRM):
    name: ClassVar[str] = "my-prm"
    architectures: ClassVar[tuple[str, ...]] = ("MyPRM",)


def test_an_adapter_of_ones_own(
    start_llm: Callable[..., Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoPRM, "_adapters", list(AutoPRM._adapters))
    AutoPRM.register(MyPRM())
    llm = start_llm(**prm_engine_args(checkpoint("pqm"), adapter="my-prm"))
    assert llm.llm_engine.model_config.architectures == ["PrmfastStepRewardModel"]
    reference = AutoPRM.from_pretrained(checkpoint("pqm"), adapter="my-prm")
    found, expected = (prm.judge([QUESTION], [ANSWER])[0].scores for prm in (VLLMPRM(llm), reference))
    assert found == pytest.approx(expected, abs=1e-5)


def test_bfloat16_runs_on_cpus_with_amx(start_llm: Callable[..., Any], checkpoint: Checkpoint, prm_llm: Any) -> None:
    """Without the plugin the process ends in an illegal instruction there."""
    llm = start_llm(**prm_engine_args(checkpoint("qwen"), dtype="bfloat16"))
    found, expected = (VLLMPRM(one).judge([QUESTION], [ANSWER])[0].scores for one in (llm, prm_llm))
    assert found == pytest.approx(expected, abs=0.1)
    assert found != expected
