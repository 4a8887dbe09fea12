"""Training sets: recorded readings of the released programs, and an error that names row, column and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prmfast.prm.data import (
    OutcomeExample,
    PairExample,
    PrefixExample,
    RowError,
    StepExample,
    encode_conversation,
    prompt_id,
    read_examples,
    read_rows,
    schema_of,
)
from prmfast.prm.data.conversation import Message
from prmfast.prm.value_head import PROMPTS

TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ALPHABET = "<>/abcdefghijklmnopqrstuvwxyz0123456789+? "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per character, with the template of the recorded cases."""
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


def test_math_shepherd(shared_vectors: Path) -> None:
    """Rows that the released reader drops are skipped or named; the others give its prompts and labels."""
    recorded = json.loads((shared_vectors / "pqm_data.json").read_text(encoding="utf-8"))
    rows = recorded["rows"]
    found = []
    for example in read_examples(rows, errors="skip"):
        assert isinstance(example, StepExample)
        answer = "\n".join(f"Step {i}: {step} [PRM]" for i, step in enumerate(example.steps, start=1))
        query = PROMPTS["train"].replace("{question}", example.question)
        found.append({"query": query, "answer": answer, "labels": list(example.labels)})
    assert found == [example for bucket in recorded["train"].values() for example in bucket]
    reasons = {}
    for number, row in enumerate(rows):
        try:
            list(read_examples([row]))
        except RowError as error:
            reasons[number] = str(error)
    assert sorted(reasons) == [1, 3, 4]
    assert 'input must have a "Step k:"' in reasons[1]
    assert "label must end every step in + or -, step 2 ends in 'b'" in reasons[3]
    assert "label must have 2 steps like input, got 3" in reasons[4]
    with pytest.raises(RowError, match=r"^row 1: input must have") as caught:
        list(read_examples(rows))
    assert caught.value.row == 1


def test_conversations(tokenizer: Any, shared_vectors: Path) -> None:
    """Recorded cuts of the released reader; where it returns nothing at all, ours says why."""
    recorded = json.loads((shared_vectors / "ipvrm_data.json").read_text(encoding="utf-8"))
    empty = 0
    for case in recorded["encode"]:
        if case["target_tokens"] == 0:
            empty += 1
            with pytest.raises(ValueError, match=r"conversation must (end with the assistant's message|be a list)"):
                encode_conversation(case["conversation"], tokenizer, max_length=case["max_length"])
            continue
        found = encode_conversation(case["conversation"], tokenizer, max_length=case["max_length"])
        assert "".join(tokenizer.convert_ids_to_tokens(found.token_ids)) == case["input"]
        assert [int(inside) for inside in found.answer_mask] == case["completion_mask"]
        assert sum(found.answer_mask) == case["target_tokens"]
    assert 0 < empty < len(recorded["encode"])
    for key, expected in recorded["prompt_id"].items():
        assert prompt_id(json.loads(key)) == expected


def test_conversation_errors(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encode_conversation(turns, tokenizer, max_length=0)
    with pytest.raises(ValueError, match=r'conversation\[1\] must have strings "role" and "content"'):
        encode_conversation([turns[0], {"role": "assistant", "content": None}], tokenizer, max_length=9)  # type: ignore[dict-item]
    forgetful = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ messages[-1].content }}"
    )
    with pytest.raises(ValueError, match="tokenizer must have a chat template whose conversation begins with"):
        encode_conversation(turns, forgetful, max_length=9)


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"prompt": "q", "completions": ["a", "b"], "labels": [True, 0.25]},
            StepExample("q", ("a", "b"), (1.0, 0.25)),
        ),
        (
            {"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": 1},
            OutcomeExample((Message("user", "q"), Message("assistant", "a")), 1.0),
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PairExample((Message("user", "q"),), "a", "b")),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PairExample((Message("user", "q"),), "a", "b")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PairExample((Message("user", "q"),), "a", "b")),
        (
            {"question": "q", "reasoning_prefix": "", "success_prob": 0.125},
            PrefixExample("q", "", 0.125),
        ),
    ],
)
def test_schemas_are_told_by_their_columns(row: dict[str, Any], example: Any, tmp_path: Path) -> None:
    assert list(read_examples([row, row])) == [example, example]
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" if name == "rows.jsonl" else json.dumps([row]))
        assert list(read_examples(tmp_path / name)) == [example]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completions": ["a"] * (1 + i % 3), "labels": [1] * (1 + i % 3)} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == rows
    found = list(read_examples(tmp_path / "rows.parquet"))
    assert found[2999] == StepExample("q2999", ("a",) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=r"path must end in .parquet, .jsonl or .json, got 'rows.csv'"):
        list(read_examples("rows.csv"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completions": "a", "labels": [1]}, "completions must be a list of strings, got 'a'"),
        ({"prompt": "q", "completions": ["a"], "labels": [1, 0]}, r"one entry per completion \(1\), got \[1, 0\]"),
        ({"prompt": "q", "completions": [], "labels": []}, r"completions must not be empty"),
        ({"prompt": 3, "completions": ["a"], "labels": [1]}, "prompt must be a string, got int"),
        ({"prompt": "q", "completions": ["a"], "labels": [-100]}, r"labels\[0\] must be .* in \[0, 1\], got -100"),
        ({"conversation": [USER], "label": 1}, "must end with the assistant's message, got role 'user'"),
        ({"conversation": [USER, GOOD], "label": float("nan")}, "label must be a boolean or a number .* got nan"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "differ in the last message alone.* got 2 and 2 messages"),
        ({"chosen": "a", "rejected": "b"}, "or answers to a column prompt, got 1 and 1 messages"),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [BAD]}, "must be one answer to prompt, got 2 and 1"),
        ({"question": "q", "reasoning_prefix": None, "success_prob": 1}, "reasoning_prefix must be a string, got None"),
        ({"question": "q", "reasoning_prefix": "", "success_prob": "1"}, "success_prob must be .* got '1'"),
    ],
)
def test_errors_name_the_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"^row 0: .*{message}"):
        list(read_examples([row]))


def test_errors_of_the_whole_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns must fit one schema, \['text'\] fit none. Schemas: math_shepherd"):
        schema_of(["text"])
    with pytest.raises(RowError, match=r"row 0: schema must be one of math_shepherd, stepwise, .* got 'trl'"):
        list(read_examples([{}], schema="trl"))
    good = {"question": "q", "reasoning_prefix": "", "success_prob": 1}
    with pytest.raises(RowError, match=r"row 1: success_rate rows must have the columns .* got no success_prob"):
        list(read_examples([good, {"question": "q", "reasoning_prefix": ""}]))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n[1]\n")
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1 must be an object, got list"):
        list(read_examples(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n\n{{broken\n")
    with pytest.raises(ValueError, match=r"rows.jsonl: row 2 is no JSON: Expecting property name"):
        list(read_examples(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="errors must be 'raise' or 'skip', got 'drop'"):
        list(read_examples([good], errors="drop"))  # type: ignore[arg-type]
