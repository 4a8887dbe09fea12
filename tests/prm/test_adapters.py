"""Templates: the released strings, golden token ids, and ids that later steps leave alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from prmfast.prm import MathShepherd, PRMAdapter, PRMError, QwenMathPRM, ReasonEval, StepSeparatorPRM, ValueHeadPRM
from tests.prm.models import CHATML, byte_level, sentencepiece, with_end

QUESTION = "What is 1+1?"
QWEN, PQM = byte_level(CHATML), byte_level(("<|endoftext|>", "[PRM]"))
MISTRAL, MISTRAL_BOS_PAD = sentencepiece(), sentencepiece(pad="<s>")
READERS: dict[str, tuple[PRMAdapter, Any]] = {
    "qwen": (QwenMathPRM(), QWEN),
    "shepherd": (MathShepherd(), MISTRAL),
    "shepherd-apart": (MathShepherd(), sentencepiece(tag="apart")),
    "shepherd-prepend": (MathShepherd("\n"), sentencepiece(scheme="prepend")),
    "reasoneval": (ReasonEval(), MISTRAL_BOS_PAD),
    "reasoneval-released": (ReasonEval("released"), MISTRAL_BOS_PAD),
    "reasoneval-34b": (ReasonEval(), sentencepiece(pad="</s>", scheme="prepend")),
    "pqm": (ValueHeadPRM(), PQM),
    "separator": (StepSeparatorPRM("\n\n"), MISTRAL),
}
STEP_TOKENS = {"qwen", "shepherd", "shepherd-apart", "shepherd-prepend", "pqm"}
TEXT = st.text(alphabet="aSt1+-. \n$é", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def texts(shared_vectors: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared_vectors / "calprm_text.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def pqm(shared_vectors: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared_vectors / "pqm_data.json").read_text(encoding="utf-8"))
    return found


def test_training_strings_of_the_released_code(texts: dict[str, Any]) -> None:
    """A training row is one prefix with one step token behind it, then the label's token and what ends the text."""
    for i, row in enumerate(texts["train_examples"]):
        prefix, label = row["first_pass_prefix"].strip(), row["accuracy_token"]
        steps = [prefix] if prefix else []
        ending = f"{label}<|im_end|><|endoftext|>"
        assert QwenMathPRM().text(row["question"], steps) + ending == texts["qwen"][i]
        assert MathShepherd().text(row["question"], steps) + label == texts["shepherd"][i]
        # the training text of ReasonEval has a stray quotation mark behind the prefix
        assert ReasonEval().text(row["question"], [f'{prefix}"']) + f"<s>{label}" == texts["reasoneval"][i]


def test_scoring_strings_of_the_released_code(texts: dict[str, Any]) -> None:
    qwen, shepherd = texts["score_time_qwen_assistant_content"], texts["score_time_shepherd"]
    for steps, key in ((["s1", "s2"], "example"), ([], "empty_answer")):
        assert QwenMathPRM().text("Q", steps).endswith(f"<|im_start|>assistant\n{qwen[key]}")
        assert MathShepherd().text("Q", steps) == shepherd[key]


def test_pqm_strings_of_the_released_code(pqm: dict[str, Any]) -> None:
    released = ValueHeadPRM(variant="released")
    prompt = pqm["eval_prompt"].replace("QUESTION", QUESTION)
    for row in pqm["eval_split"]:
        expected = pqm["input_template"].format(query=prompt, answer=row["answer"])
        assert released.text(QUESTION, released.split_steps(row["response"])) == expected
    train = ValueHeadPRM(prompt="train")
    for row in pqm["train"]["short(<=512)"][:1]:
        question = row["query"].removeprefix("[INST] ").removesuffix(" [/INST]")
        steps = [step.removesuffix(" [PRM]") for step in row["answer"].split("\n")]
        assert train.text(question, steps) == pqm["input_template"].format(**row)
        assert train.split_steps("\n".join(steps)) == steps


def test_pqm_numbers_steps_from_one() -> None:
    answer = "Step 1: a\nStep 2: b\n\nStep 3: c"
    assert ValueHeadPRM().split_steps(answer) == ["Step 1: a", "Step 2: b", "Step 3: c"]
    assert ValueHeadPRM(variant="released").split_steps(answer) == ["Step 2: a", "Step 3: b", "Step 4: c"]


def test_reasoneval_indices_of_the_released_code(shared_vectors: Path) -> None:
    """The released index is one before the step's last token; ``variant="paper"`` reads the last token."""
    for row in json.loads((shared_vectors / "calprm_reasoneval_index.json").read_text(encoding="utf-8")):
        kept, bounds, early = ReasonEval().remove_separators(row["input_ids"], row["sep"])
        assert kept == row["adjusted"]
        assert early == 0
        assert bounds[1:] == row["position_of_last_step_token_in_adjusted"]
        *_, early = ReasonEval("released").remove_separators(row["input_ids"], row["sep"])
        assert [bound - early for bound in bounds[1:]] == row["indices"]


def test_reasoneval_34b_has_no_index_off_by_one() -> None:
    adapter, tokenizer = ReasonEval("released"), sentencepiece(pad="</s>")
    assert adapter.encode(tokenizer, "Q", ["ab", "c"]) == ReasonEval().encode(tokenizer, "Q", ["ab", "c"])


# in tokenizers whose special tokens have the released ids, so far as they are known; letters differ
RELEASED_IDS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<extra_0>": 151651}
QWEN_PROMPT = (  # <|im_start|> system S <|im_end|> <|im_start|> user Q+ <|im_end|> <|im_start|> assistant
    "151644 82 88 256 68 76 198 50 151645 198 151644 84 82 68 81 198 48 10 151645 198 151644 "
    "64 82 82 72 256 64 77 83 198"
)
REASONEVAL_PROMPT = (  # <s> Question: Q+ Answer: Let's think step by step.
    "1 267 316 352 336 350 351 340 346 345 293 13 316 278 13 300 345 350 354 336 349 293 13 311 336 351 274 350 267 "
    "351 339 340 345 342 267 350 351 264 267 333 356 267 350 351 264 281 13"
)
PQM_PROMPT = "58 40 45 50 51 60 220 48 10 220 58 14 40 45 50 51 60 198"  # [INST] Q+ [/INST]
# adapter, tokenizer; prompt, what two steps add and their rows, what the empty answer adds and its row
GOLDEN: dict[str, tuple[PRMAdapter, Any, str, str, tuple[int, ...], str, tuple[int, ...]]] = {
    "qwen": (
        QwenMathPRM(system="S"),
        byte_level(RELEASED_IDS),
        QWEN_PROMPT,
        "50 83 220 64 151651 65 151651",
        (34, 36),
        "151651",
        (30,),
    ),
    "shepherd": (
        MathShepherd(),
        sentencepiece(released=True),
        "1 267 316 278",
        "263 267 332 12902 13 13 333 12902",
        (7, 11),
        "267 12902",
        (5,),
    ),
    "shepherd-apart": (
        MathShepherd(),
        sentencepiece(tag="apart", released=True),
        "1 266 315 277",
        "263 266 331 266 12902 13 13 332 266 12902",
        (8, 13),
        "259 12902",
        (5,),
    ),
    "reasoneval": (
        ReasonEval(),
        MISTRAL_BOS_PAD,
        REASONEVAL_PROMPT,
        "262 267 332 333",
        (49, 50),
        "",
        (46,),
    ),
    "reasoneval-released": (
        ReasonEval("released"),
        MISTRAL_BOS_PAD,
        REASONEVAL_PROMPT,
        "262 267 332 333",
        (48, 49),
        "",
        (45,),
    ),
    "pqm": (
        ValueHeadPRM("train"),
        PQM,
        PQM_PROMPT,
        "50 83 220 64 220 259 198 65 220 259",
        (23, 27),
        "220 259",
        (19,),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_token_ids(name: str) -> None:
    adapter, tokenizer, prompt, steps, rows, empty, empty_row = GOLDEN[name]
    for given_steps, ids, expected in ((["St a", "b"], steps, rows), ([], empty, empty_row)):
        chain = adapter.encode(tokenizer, "Q+", given_steps)
        assert " ".join(map(str, chain.token_ids)) == f"{prompt} {ids}".strip()
        assert chain.step_positions == expected


@pytest.mark.parametrize("name", READERS)
def test_ids_read_back_as_the_text(name: str) -> None:
    adapter, tokenizer = READERS[name]
    steps = ["Step 1: a", "Step 2: b é", "c"]
    for n in range(4):
        chain = adapter.encode(tokenizer, QUESTION, steps[:n])
        ids = chain.token_ids[1:] if chain.token_ids[0] == tokenizer.bos_token_id else chain.token_ids
        text = adapter.text(QUESTION, steps[:n])
        # sentencepiece writes the two spaces of the empty answer in another way, and a space in front of each part
        # that a special token cuts off
        assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())
        if name in ("qwen", "pqm"):
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None)
@given(question=TEXT, steps=st.lists(TEXT, min_size=1, max_size=4), more=TEXT)
def test_a_later_step_changes_nothing_before_it(name: str, question: str, steps: list[str], more: str) -> None:
    adapter, tokenizer = READERS[name]
    assert adapter.incremental
    before, after = adapter.encode(tokenizer, question, steps), adapter.encode(tokenizer, question, [*steps, more])
    assert after.token_ids[: len(before.token_ids)] == before.token_ids
    assert after.step_positions[:-1] == before.step_positions
    assert len(after.step_positions) == len(steps) + 1


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None)
@given(question=TEXT, steps=st.lists(TEXT, max_size=3))
def test_a_step_token_id_finds_the_rows(name: str, question: str, steps: list[str]) -> None:
    adapter, tokenizer = READERS[name]
    chain = adapter.encode(tokenizer, question, steps)
    mark = adapter.step_token_id(tokenizer)
    assert (mark is not None) == (name in STEP_TOKENS)
    assert len(chain.step_positions) == max(len(steps), 1)
    assert 0 <= chain.step_positions[0] <= chain.step_positions[-1] < len(chain.token_ids)
    if mark is not None:
        assert chain.step_positions == tuple(i for i, token in enumerate(chain.token_ids) if token == mark)
        assert chain.step_positions[-1] == len(chain.token_ids) - 1


@pytest.mark.parametrize("name", ["shepherd", "shepherd-apart", "shepherd-prepend"])
@settings(max_examples=40, deadline=None)
@given(question=TEXT, steps=st.lists(TEXT.map(str.strip), min_size=1, max_size=3))
def test_math_shepherd_by_parts_is_the_released_whole(name: str, question: str, steps: list[str]) -> None:
    adapter, tokenizer = READERS[name]
    assert (
        list(adapter.encode(tokenizer, question, steps).token_ids)
        == tokenizer(adapter.text(question, steps))["input_ids"]
    )


@pytest.mark.parametrize("name", ["shepherd", "shepherd-apart", "shepherd-prepend"])
def test_white_space_before_the_tag_does_not_swallow_it(name: str) -> None:
    adapter, tokenizer = READERS[name]
    assert len(adapter.encode(tokenizer, "Q", []).step_positions) == 1
    assert len(adapter.encode(tokenizer, "Q", ["a ", "b  "]).step_positions) == 2


@pytest.mark.parametrize(
    ("name", "tokenizer"), [("qwen", with_end(byte_level(CHATML))), ("shepherd", with_end(sentencepiece()))]
)
def test_an_end_token_that_the_tokenizer_appends_is_left_out(name: str, tokenizer: Any) -> None:
    adapter, plain = READERS[name]
    assert tokenizer("Q")["input_ids"][-1] == tokenizer.eos_token_id
    for steps in ([], ["a"], ["a", "b"], ["a ", "b "]):
        assert adapter.encode(tokenizer, "Q", steps) == adapter.encode(plain, "Q", steps)


@pytest.mark.parametrize("name", READERS)
def test_answers_are_split_into_steps_without_empty_ones(name: str) -> None:
    adapter, _ = READERS[name]
    gap = "\nStep 2: " if name == "pqm" else adapter.separator
    steps = adapter.split_steps(f"a{gap}b{gap}{gap} ")
    assert [step.removeprefix("Step 1: ").removeprefix("Step 2: ") for step in steps] == ["a", "b"]
    assert adapter.split_steps("") == []


@pytest.mark.parametrize("name", READERS)
def test_a_policy_cannot_mark_steps_of_its_own(name: str) -> None:
    adapter, tokenizer = READERS[name]
    mark = adapter.step_token(None)
    if mark is None:
        pytest.skip("no step token")
    half = len(mark) // 2
    steps = adapter.split_steps(f"a{mark} b{mark[:half]}{mark}{mark[half:]}c")
    assert [step.removeprefix("Step 1: ") for step in steps] == ["a bc"]
    assert len(adapter.encode(tokenizer, "Q", steps).step_positions) == 1


@pytest.mark.parametrize(
    ("name", "inside"),
    [("qwen", "<extra_0>"), ("shepherd", " ки "), ("shepherd-apart", "Науки"), ("reasoneval", "<s>"), ("pqm", "[PRM]")],
)
def test_a_step_token_in_the_text_is_an_error(name: str, inside: str) -> None:
    adapter, tokenizer = READERS[name]
    for question, steps in ((f"a{inside}b", ["c"]), ("a", [f"b{inside}c", "d"])):
        with pytest.raises(ValueError, match="question and steps must not contain the step token"):
            adapter.encode(tokenizer, question, steps)


def test_reasoneval_names_the_step_without_a_token() -> None:
    with pytest.raises(ValueError, match=r"steps\[1\] must have at least one token, got ''"):
        ReasonEval().encode(MISTRAL_BOS_PAD, "Q", ["a", ""])


class Config:
    vocab_size = 10_000
    hidden_size = 8


@pytest.mark.parametrize(
    ("adapter", "tokenizer", "message"),
    [
        (QwenMathPRM(), byte_level(("<|im_start|>", "<|im_end|>")), "must have '<extra_0>' as one token"),
        (QwenMathPRM(), byte_level(("<extra_0>",)), r"must have '<\|im_start\|>' as one token"),
        (MathShepherd(), sentencepiece(tag="none"), "must have the step tag 'ки' as a token"),
        (MathShepherd(), QWEN, "must have the step tag 'ки' as a token"),
        (ReasonEval(), MISTRAL, "pad_token separates the steps and must be one token, got None"),
        (ValueHeadPRM(), QWEN, r"must have '\[PRM\]' as one token"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_an_error(adapter: PRMAdapter, tokenizer: Any, message: str) -> None:
    with pytest.raises(PRMError, match=f"{message}.*released with the checkpoint"):
        adapter.check(Config(), tokenizer)


def test_a_tokenizer_beyond_the_vocabulary_is_an_error() -> None:
    config = Config()
    config.vocab_size = len(QWEN) - 1
    with pytest.raises(PRMError, match=f"a token id {len(QWEN) - 1}, the model's vocabulary {len(QWEN) - 1} entries"):
        QwenMathPRM().check(config, QWEN)


def test_math_shepherd_needs_its_tokenizer_for_the_head() -> None:
    with pytest.raises(ValueError, match="tokenizer must be given"):
        MathShepherd().head(Config())
    with pytest.raises(PRMError, match=r'must read "\+ -" as two tokens'):
        MathShepherd().head(Config(), QWEN)
    head = MathShepherd().head(Config(), MISTRAL)
    assert MISTRAL.convert_ids_to_tokens(list(head.rows)) == ["▁+", "▁-"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReasonEval("text"), "variant must be 'paper' or 'released', got 'text'"),
        (lambda: ValueHeadPRM(prompt="test"), "prompt must be 'eval' or 'train', got 'test'"),
        (lambda: ValueHeadPRM(variant="text"), "variant must be 'paper' or 'released', got 'text'"),
        (lambda: MathShepherd("; "), "separator must be white space, got '; '"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_reasoneval_refuses_another_number_of_classes() -> None:
    config = Config()
    config.score_dimension = 2
    with pytest.raises(ValueError, match=r"score_dimension must be 3 .* got 2"):
        ReasonEval().head(config)
