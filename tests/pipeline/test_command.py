"""`prmfast label` on the embedded world and on a checkpoint, and what it reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from prmfast.cli import app
from prmfast.pipeline.sources import chat_prompts, read_questions, reference_answers
from prmfast.tiny import TinyWorld, task
from prmfast.traces import read_traces

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size"),
    *("eos_token_id", "pad_token_id", "bos_token_id"),
)


def prmfast(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="prmfast")


def ok(*arguments: object) -> str:
    done = prmfast(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return str(done.stdout)


def refused(*arguments: object) -> str:
    done = prmfast(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("error: ")
    return str(done.stderr)


@pytest.fixture(scope="module")
def questions(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    texts = world.questions(5, seed=8)
    path.write_text("".join(json.dumps({"question": q, "answer": task.answer_of(q)}) + "\n" for q in texts))
    return path


def test_the_embedded_world(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("label", questions, "-o", out, "--samples", 2, "--rollouts", 3, "--quiet")
    told = ok(*command)
    assert "10 answers of 5 questions" in told
    assert "rollouts of prefixes (every step), 15 of empty answers" in told
    assert read_traces(out / "traces.parquet").num_rows == 10
    before = (out / "traces.parquet").stat().st_mtime_ns
    assert ok(*command) == told
    assert (out / "traces.parquet").stat().st_mtime_ns == before
    assert "settings.seed must be 0, got 1" in refused(*command, "--seed", 1)
    assert "% fewer than" in ok(*command[:3], tmp_path / "short", *command[4:], "--bisection")


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_a_policy_by_its_folder(world: TinyWorld, questions: Path, tmp_path: Path) -> None:
    """The tiny policy as a Llama: transformers 5 would give a folder of a Qwen2 model Qwen2's own tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "policy"
    policy = transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory())
    sizes = {name: getattr(policy.config, name) for name in SIZES}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attention_bias=True))
    weights = {name: torch.zeros_like(value) for name, value in llama.state_dict().items() if "o_proj.bias" in name}
    llama.load_state_dict(policy.state_dict() | weights)
    llama.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TinyWorld.tokenizer_directory()).save_pretrained(folder)
    out = tmp_path / "run"
    told = ok(
        *("label", questions, "-o", out, "--policy", folder, "--samples", 2, "--rollouts", 2),
        *("--max-new-tokens", 20, "--quiet"),
    )
    assert "10 answers of 5 questions" in told
    rows = read_traces(out / "traces.parquet").to_pylist()
    assert len({row["correct"] for row in rows}) == 2
    for row in rows:
        assert row["policy_id"] == str(folder)
        assert row["correct"] == world.verify(row["question"], row["completion"])


def test_what_cannot_be_done_is_said_in_one_line(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("-o", tmp_path / "run")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else found(name))
    assert 'pip install "prmfast[verify]"' in refused("label", questions, "--policy", "some/model", *out)
    assert "QUESTIONS must be given with --policy some/model" in refused("label", "--policy", "some/model", *out)
    assert "--prm must be tiny" in refused("label", "--prm", "other", *out)
    assert "does not exist" in refused("label", tmp_path / "absent.parquet", *out)
    assert "must be a .parquet or .jsonl file, got 'questions.csv'" in refused("label", "questions.csv", *out)
    assert "samples must be at least 1, got 0" in refused("label", "--samples", 0, *out)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no parquet")
    assert "must be parquet" in refused("label", bad, *out)
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), bad)
    assert "questions must have at least one entry, got 0" in refused("label", bad, *out)
    assert not (tmp_path / "run").exists()


def test_questions_and_answers_are_read(questions: Path, tmp_path: Path) -> None:
    table = read_questions(questions)
    pq.write_table(table, tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet").equals(table)
    answers = reference_answers(table)
    assert all(answers[question] == str(task.answer_of(question)) for question in answers)
    with pytest.raises(ValueError, match="questions must have a column answer, got question"):
        reference_answers(table.select(["question"]))
    with pytest.raises(ValueError, match=r"questions\[1\]: answer must be known, got null"):
        reference_answers(pa.table({"question": ["a", "b"], "answer": ["1", None]}))


def test_chat_prompts_leave_the_begin_token_to_the_tokenizer() -> None:
    class Plain:
        chat_template = None

    class Chat:
        chat_template = "some"
        bos_token = "<s>"

        def apply_chat_template(self, turns: list[dict[str, str]], **options: bool) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return f"<s>[{turns[0]['role']}] {turns[0]['content']} [assistant]"

    assert chat_prompts(Plain(), ["1 + 1"]) == ["1 + 1"]
    assert chat_prompts(Chat(), ["1 + 1"]) == ["[user] 1 + 1 [assistant]"]
