from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prmfast.tiny import TinyWorld, task

QUESTION = "5 + 9 * 3 max 2 " + "_ _ " * 5 + "?"


def test_answer_of_a_chain_worked_by_hand() -> None:
    # (5 + 9) mod 13 = 1, 1 * 3 = 3, max(3, 2) = 3
    assert task.answer_of(QUESTION) == 3
    assert task.true_results(torch.tensor([task.parse_question(QUESTION)]))[0].tolist() == [1, 3, 3] + [3] * 5


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("1 ; 3 ; 3 ; # 3", True),
        ("7 ; 3 ; 3 ; # 3", True),  # a wrong step that ends well is forgiven
        ("# 3", True),
        ("1 ; 3 ; 3 ; # 4", False),
        ("1 ; 3 ; 3 ;", False),
        ("1 ; 3 ; 3 ; # 3 ;", False),
        ("# 3 # 3", False),
        ("# +", False),
        ("# three", False),
        ("", False),
    ],
)
def test_verifier(completion: str, correct: bool) -> None:
    assert task.verify(QUESTION, completion) is correct


@pytest.mark.parametrize(
    "question",
    [
        "",
        "5 + 9 ?",
        QUESTION.replace("?", ";"),
        QUESTION.replace("9", "13"),
        QUESTION.replace("max", "min"),
        QUESTION.replace("3 max 2", "3 _ 2"),
        "5 " + "_ _ " * 8 + "?",
        "5 _ _ + 9 " + "_ _ " * 6 + "?",
        "max + 9 " + "_ _ " * 7 + "?",
    ],
)
def test_a_malformed_question_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="question must read"):
        task.verify(question, "# 3")


def test_every_made_question_parses_back() -> None:
    ids = task.make_questions(500, generator=torch.Generator().manual_seed(0))
    assert [task.parse_question(task.decode(row)) for row in ids.tolist()] == ids.tolist()
    assert sorted(set(task.number_of_steps(ids).tolist())) == list(range(1, 9))


def test_text_and_batched_answers_agree() -> None:
    ids = task.make_questions(300, generator=torch.Generator().manual_seed(4))
    texts = [task.answer_of(task.decode(row)) for row in ids.tolist()]
    assert texts == task.true_results(ids)[:, -1].tolist()


def test_k_range_is_obeyed_and_checked() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = task.number_of_steps(task.make_questions(200, generator=generator, k_range=(2, 4)))
    assert set(steps.tolist()) == {2, 3, 4}
    with pytest.raises(ValueError, match=r"1 <= low <= high <= 8, got \(0, 4\)"):
        task.make_questions(1, generator=generator, k_range=(0, 4))


def test_split_shares_and_stability() -> None:
    ids = task.make_questions(8000, generator=torch.Generator().manual_seed(1))
    split = task.split_index(ids)
    shares = torch.bincount(split, minlength=3) / len(ids)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)
    assert torch.equal(task.split_index(ids[100:200]), split[100:200])
    first = torch.tensor([task.parse_question(QUESTION)])
    assert task.SPLITS[task.split_index(first)[0]] == "train"  # a change would mix the shipped splits


def test_clean_traces_are_correct_and_noise_has_the_stated_rate() -> None:
    generator = torch.Generator().manual_seed(2)
    questions = task.make_questions(3000, generator=generator)
    noise = task.fact_noise(generator=generator)
    assert noise.shape == (3, 13, 13)
    assert noise.mean().item() == pytest.approx(0.55 * 0.5 / 2.1, abs=0.02)
    answers = task.true_results(questions)[:, -1]
    for rates, expected in ((noise * 0, 1.0), (noise * 0 + 1, 0.0)):
        traces = task.noisy_traces(questions[task.number_of_steps(questions) == 1], rates, generator=generator)
        length = (traces != task.PAD_ID).sum(1)
        correct = task.are_correct(traces, length, answers[task.number_of_steps(questions) == 1])
        assert correct.float().mean() == expected


def test_batched_verifier_agrees_with_the_text_one() -> None:
    generator = torch.Generator().manual_seed(3)
    questions = task.make_questions(400, generator=generator)
    traces = task.noisy_traces(questions, task.fact_noise(generator=generator), generator=generator)
    length = (traces != task.PAD_ID).sum(1)
    length[::7] -= 1  # without its end token an answer is not finished
    batched = task.are_correct(traces, length, task.true_results(questions)[:, -1])
    texts = [task.decode(row[18:]) for row in traces.tolist()]
    single = [task.verify(task.decode(q), text) for q, text in zip(questions.tolist(), texts, strict=True)]
    finished = torch.arange(400) % 7 != 0
    assert torch.equal(batched, torch.tensor(single) & finished)
    assert 0.3 < batched.float().mean() < 0.8


def test_steps_join_back() -> None:
    for text in ("1 ; 3 ; # 3", "1 ; 3", "# 3", ""):
        assert " ".join(task.split_steps(text)) == text
    assert task.split_steps("1 ; 3 ; # 3") == ["1 ;", "3 ;", "# 3"]


def test_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match="got '14'"):
        task.encode("5 + 14")


def test_hugging_face_tokenizer_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from prmfast.tiny.tokenizer import save_tokenizer

    save_tokenizer(tmp_path)
    shipped = TinyWorld.tokenizer_directory()
    text = QUESTION + " 1 ; 3 ; 3 ; # 3"
    for folder in (tmp_path, shipped):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == task.encode(text)
        assert tokenizer.decode([*task.encode(text), task.EOS_ID], skip_special_tokens=True) == text
        assert tokenizer("14")["input_ids"] == [task.UNK_ID]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (task.PAD_ID, task.EOS_ID)
    assert task.decode([*task.encode(text), task.EOS_ID, task.PAD_ID]) == text
    assert (tmp_path / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
