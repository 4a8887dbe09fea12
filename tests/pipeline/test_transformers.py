"""The pipeline over a transformers policy with random weights, its answers checked by a verifier of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prmfast.engines import TransformersEngine
from prmfast.pipeline import Labeller, LabelSettings, SplitAfter, label_questions

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ("<end>", "step", "one", "two", "is", "right", "wrong", ".", "\n\n", "?")


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """A Llama of two layers over ten words; blank lines and the end are likely enough to be drawn."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n\n|[a-z]+|\.|\?"), "removed", True)
    words.decoder = tokenizers.decoders.Fuse()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=0,
            initializer_range=0.1,
        )
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    return TransformersEngine(model, tokenizer, max_new_tokens=12, policy_id="random-llama")


def verify(question: str, completion: str) -> bool:
    return completion.count("right") > completion.count("wrong")


QUESTIONS = ["one?", "two?", "stepone", "istwo?"]


def test_labels_of_a_transformers_policy(engine: TransformersEngine, tmp_path: Path) -> None:
    settings = LabelSettings(samples=8, rollouts=4, logprobs=True, hidden_states=False)
    label = Labeller(engine, verify, None, SplitAfter(), settings)
    run = label_questions(QUESTIONS, tmp_path / "run", label, chunk_size=3, progress=False)
    rows = run.table().to_pylist()
    assert {row["policy_id"] for row in rows} == {"random-llama"}
    several = [row for row in rows if len(row["steps"]) > 1]
    assert len(several) >= 5
    for row in rows:
        assert row["correct"] == verify(row["question"], row["completion"])
        assert row["step_labels"] == [k > 0 for k in row["step_successes"]]
        ids = engine.sample([row["question"]], [row["seed"]])[0].token_ids
        tokens = engine.logprobs([row["question"]], [ids])[0]
        if row["steps"]:
            assert math.fsum(row["step_logprobs"]) == pytest.approx(math.fsum(tokens))
    for row in several:  # the first step ends with its blank line, whatever was written behind it
        ids = engine.sample([row["question"]], [row["seed"]])[0].token_ids
        tokens = engine.logprobs([row["question"]], [ids])[0]
        words = [WORDS[i] for i in ids]
        start = next(i for i, word in enumerate(words) if word != "\n\n")
        end = words.index("\n\n", start)
        while words[end : end + 1] == ["\n\n"]:
            end += 1
        assert row["step_logprobs"][0] == pytest.approx(math.fsum(tokens[:end]))
    assert any(0 < k < n for row in rows for k, n in zip(row["step_successes"], row["step_trials"], strict=True))
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    assert '"max_new_tokens": 12' in manifest


def test_a_released_prm_scores_the_steps(engine: TransformersEngine, tmp_path: Path) -> None:
    from prmfast.prm import AutoPRM
    from tests.prm.models import save

    with torch.no_grad():
        save("qwen", tmp_path / "prm")
    prm = AutoPRM.from_pretrained(tmp_path / "prm")
    label = Labeller(engine, verify, prm, SplitAfter(prm.adapter.separator), LabelSettings(samples=6, rollouts=2))
    run = label_questions(QUESTIONS[:2], tmp_path / "run", label, progress=False)
    rows = run.table().to_pylist()
    assert max(len(row["steps"]) for row in rows) > 1
    for row in rows:
        wanted = prm.score([row["question"]], [[row["completion"]]])[0][0]
        assert row["prm_step_scores"] == pytest.approx(wanted, abs=1e-5)
        assert [len(state) for state in row["hidden_states"]] == [64] * len(row["steps"])
        assert len(row["question_hidden"]) == 64
    data = run.data()
    assert (data.prm_id, data.policy_id) == (prm.prm_id, "random-llama")


def test_log_probabilities_are_the_models(engine: TransformersEngine) -> None:
    done = engine.sample(QUESTIONS * 2, list(range(8)))
    found = engine.logprobs([c.prompt for c in done], [c.token_ids for c in done])
    for completion, values in zip(done, found, strict=True):
        start = engine.tokenizer(completion.prompt)["input_ids"]
        ids = torch.tensor([[*start, *completion.token_ids]])
        logits = engine.model(ids).logits.detach()[0, len(start) - 1 : -1].double()
        wanted = logits.log_softmax(-1)[torch.arange(len(values)), ids[0, len(start) :]]
        assert values == pytest.approx(wanted.tolist(), abs=1e-5)
        assert engine.text(completion.token_ids) == completion.text
    assert engine.logprobs(["one?"], [()]) == [[]]
    assert engine.logprobs([], []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one?"], []), r"token_ids must have one entry per prompt \(1\), got 0"),
        (([""], [[1]]), r"prompts\[0\] must have at least one token"),
    ],
)
def test_errors(engine: TransformersEngine, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.logprobs(*arguments)
