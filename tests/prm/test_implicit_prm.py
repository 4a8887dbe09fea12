"""A trained policy and its reference as a PRM: what it scores, how it is found again, and that best-of-N takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")

from transformers import AutoModelForCausalLM

from prmfast.engines import Judge, Scorer, StepScorer, TransformersEngine
from prmfast.ias import BestOfN, FixedBudget
from prmfast.prm import AutoPRM, ImplicitPRM, PRMError, load_prm
from prmfast.prm.train import ImplicitConfig, ImplicitTrainer
from tests.prm.models import byte_level
from tests.prm.train.test_implicit import language_model, outcomes

QUESTION = "Q1"
STEPS = ["aba", "bb", "a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = language_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Any, folder: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    run = ImplicitTrainer(base, ImplicitConfig(output_dir=str(folder), **(defaults | options)), outcomes())
    run.train()
    run.save_model()
    return folder


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(str(base), tmp_path_factory.mktemp("ipvrm") / "my-ipvrm")


def by_logits(folder: Path, base: Path, text: str) -> torch.Tensor:
    """log pi - log pi_ref of each of the answer's tokens (bytes), from whole float64 logits."""
    _, tokenizer = language_model()
    prompt = tokenizer(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer(text)["input_ids"]
    assert len(answer) == len(text)
    ids = torch.tensor([[*prompt, *answer]])
    found = []
    for path in (folder, base):
        model = AutoModelForCausalLM.from_pretrained(path).double()
        with torch.no_grad():
            whole = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(whole[len(prompt) - 1 :])
    return found[0] - found[1]


@pytest.mark.parametrize("average", [True, False])
def test_scores_are_prefix_values(folder: Path, base: Path, average: bool) -> None:
    prm = load_prm(folder, dtype=torch.float64, average=average)
    assert isinstance(prm, ImplicitPRM)
    assert (prm.prm_id, prm.beta, prm.average) == ("my-ipvrm", 10.0, average)
    for protocol in (Scorer, StepScorer, Judge):
        assert isinstance(prm, protocol)
    ratio = by_logits(folder, base, "aba\n\nbb\n\na")
    spans = {"prefix": [(0, 3), (0, 7), (0, 10)], "process": [(0, 3), (3, 7), (7, 10)]}
    (ratios,) = prm.log_ratios([QUESTION], [STEPS])
    assert ratios.step_ends == (2, 6, 9)
    for protocol, parts in spans.items():
        sums = torch.stack([10 * ratio[a:b].sum() / (b - a if average else 1) for a, b in parts])
        found = prm.step_scores(ratios, protocol)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), sums.sigmoid(), rtol=1e-6, atol=1e-9)
    assert prm.score_steps([QUESTION], [STEPS]) == prm.score([QUESTION], [["aba\n\nbb\n\na"]])[0]
    process = load_prm(folder, dtype=torch.float64, average=average, protocol="process")
    assert process.score_steps([QUESTION], [STEPS])[0] == prm.step_scores(ratios, "process")


def test_batches_empty_answers_and_states(folder: Path) -> None:
    prm = load_prm(folder, batch_size=2)
    answers = ["a\n\nb", "", None, "\n\nbbb\n\n\n\na\n\n", "a"]
    found = prm.judge([QUESTION, "other", "Q2", QUESTION, "Q3"], answers)
    assert [len(one.scores) for one in found] == [2, 0, 1, 2, 1]
    assert found[2].scores == (0.5,)
    alone = prm.judge([QUESTION], answers[3:4])[0]
    assert found[3].scores == pytest.approx(alone.scores, rel=1e-5)
    score, hidden = prm.question_state([QUESTION])
    assert (score.tolist(), hidden.shape) == ([0.5], (1, 64))
    states = prm.features([QUESTION], [["a\n\nb", ""]])[0]
    assert [tuple(state.shape) for state in states] == [(2, 64), (0, 64)]


def test_it_has_learned_and_best_of_n_takes_it(folder: Path, base: Path) -> None:
    """Right answers are made of a: of samples of the reference, best-of-N keeps one with more of them."""
    prm = load_prm(folder)
    good, bad = prm.score([f"Q{i}" for i in range(4)], [["aaaa\n\naaa"]] * 4), prm.score(["Q1"], [["bbbb\n\nbb"]])
    assert min(step for row in good for step in row[0]) > 0.9
    assert max(bad[0][0]) < 0.1
    model, tokenizer = language_model()
    engine = TransformersEngine(model, tokenizer, max_new_tokens=4, policy_id="toy")
    runner = BestOfN(engine, None, None, FixedBudget(6), judge=prm, verifier=lambda question, text: "a" in text)
    result = runner.run(["Q1"])
    drawn = [one.text for one in engine.sample(["Q1"] * 6, list(range(6)))]
    best = max(drawn, key=lambda text: (prm.score(["Q1"], [[text]])[0][0] or [0.0])[-1])
    assert result.answers[0].completion == best


def test_what_does_not_fit_is_said(folder: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(PRMError, match=r"was saved as an implicit model, .* prmfast\.prm\.load_prm reads it"):
        AutoPRM.from_pretrained(folder)
    with pytest.raises(PRMError, match="has other weights than the reference of its training"):
        load_prm(folder, reference=folder)
    description = json.loads((folder / "implicit_prm.json").read_text())
    assert description["reference"] == str(base)
    (tmp_path / "implicit_prm.json").write_text(json.dumps(description | {"reference": None}))
    with pytest.raises(PRMError, match="has no name; load it with reference="):
        load_prm(tmp_path)
    prm = load_prm(folder)
    with pytest.raises(ValueError, match=r"answers\[0\]\[0\] with its question must fit into the PRM's 512 positions"):
        prm.score(["Q"], [["a" * 600]])
    with pytest.raises(ValueError, match=r"answers\[0\]: every step must have a token of its own"):
        prm.score_steps(["Q"], [["a", "", ""]])
    slow = byte_level(("<|endoftext|>",))
    with pytest.raises(PRMError, match="chat template"):
        ImplicitPRM(prm.policy.lm, prm.reference.lm, slow, beta=1.0, prm_id="p")
