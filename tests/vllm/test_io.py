"""One request with a question and many answers, offline: JSON numbers are those of the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prmfast.ops import ias_budget
from prmfast.vllm import VLLMPRM, prm_engine_args
from tests.vllm import calibrators
from tests.vllm.conftest import ANSWER, QUESTION, STEPS

Ask = Callable[..., dict[str, Any]]


def asker(llm: Any) -> Ask:
    def ask(**data: Any) -> dict[str, Any]:
        (output,) = llm.encode({"data": data}, pooling_task="plugin", use_tqdm=False)
        found: dict[str, Any] = output.outputs
        return found

    return ask


@pytest.mark.parametrize("kind", ["qwen", "reasoneval"])
def test_many_answers_in_one_request(
    kind: str, start_llm: Callable[..., Any], checkpoint: Callable[[str], str], tmp_path: Any
) -> None:
    """ReasonEval has no step token: its positions travel with the request."""
    calibrator = calibrators.save(tmp_path, "features")
    llm = start_llm(**prm_engine_args(checkpoint(kind), calibrator=calibrator))
    prm, ask = VLLMPRM(llm, levels=4), asker(llm)
    answers = [ANSWER, None, "", list(STEPS[:2]), ANSWER]
    texts = [ANSWER, None, "", "\n\n".join(STEPS[:2]), ANSWER]
    said = ask(question=QUESTION, answers=answers, levels=4, targets=[0.9, 0.5], n_max=16)
    assert said["prm_id"] == prm.prm_id
    assert said["levels"] == [0.125, 0.375, 0.625, 0.875]
    assert [len(answer["scores"]) for answer in said["answers"]] == [4, 1, 0, 2, 4]
    for found, rows in zip(said["answers"], prm.rows([QUESTION] * 5, texts), strict=True):
        if rows is None:
            assert found == {"scores": [], "positions": []}
            continue
        assert found["positions"] == rows.positions.tolist()
        for name in ("scores", "expected", "quantiles"):
            torch.testing.assert_close(torch.tensor(found[name]), getattr(rows, name), rtol=1e-5, atol=1e-5)
    spread = torch.tensor(prm_quantiles(llm, ANSWER))
    budgets = [ias_budget(spread, target, 16).tolist() for target in (0.9, 0.5)]
    assert torch.tensor(said["answers"][0]["budgets"]).T.tolist() == budgets

    raw = ask(question=QUESTION, answers=[ANSWER], calibrator=None)
    assert raw["levels"] == []
    assert set(raw["answers"][0]) == {"scores", "positions"}


def prm_quantiles(llm: Any, answer: str) -> Any:
    quantiles = VLLMPRM(llm, levels=100).judge([QUESTION], [answer])[0].quantiles
    assert quantiles is not None
    return quantiles.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"answers": ["a"]}, "question: Field required"),
        ({"question": "q", "answers": []}, "at least 1 item"),
        ({"question": "q", "answers": ["", "\n\n"]}, "answers must have at least one step"),
        ({"question": "q", "answers": ["a"], "target": 0.9}, "target: Extra inputs are not permitted"),
        ({"question": "q", "answers": ["a"], "targets": [1.0]}, "less than 1"),
        ({"question": "q", "answers": ["a"], "levels": [2.0]}, "less than or equal to 1"),
        ({"question": "q", "answers": ["a"], "calibrator": "mine"}, "calibrator must be one of those configured"),
        ({"question": "q <extra_0>", "answers": ["a"]}, "must not contain the step token"),
        (["q"], "data must be an object"),
    ],
)
def test_bad_data_is_refused_before_it_reaches_the_engine(prm_llm: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prm_llm.encode({"data": data}, pooling_task="plugin", use_tqdm=False)
    assert asker(prm_llm)(question=QUESTION, answers=[None])["answers"][0]["scores"]
