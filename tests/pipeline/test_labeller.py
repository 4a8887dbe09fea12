"""Rows of one chunk: what is drawn, how it is labelled, and what a PRM and the policy say of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from scipy import stats

from prmfast.engines import Completion
from prmfast.pipeline import Labeller, LabelSettings, SplitAfter, first_error, hard_labels, label_questions
from prmfast.pipeline.labeller import question_table
from prmfast.pipeline.rollouts import stream_seed
from prmfast.tiny import TinyWorld, task
from tests.pipeline import jobs


@pytest.fixture(scope="module")
def chunk(world: TinyWorld) -> list[str]:
    return world.questions(12, seed=21, split="calibration")


@pytest.fixture(scope="module")
def rows(world: TinyWorld, chunk: list[str]) -> list[dict[str, Any]]:
    label = jobs.labeller(world, samples=2, rollouts=16, logprobs=True)
    return list(label(question_table(chunk)).to_pylist())


def test_rows_are_samples_with_the_prms_scores(world: TinyWorld, chunk: list[str], rows: list[dict[str, Any]]) -> None:
    assert [row["question"] for row in rows] == [text for text in chunk for _ in range(2)]
    assert [row["sample_id"] for row in rows] == ["0", "1"] * 12
    for row in rows:
        drawn = world.engine.sample([row["question"]], [row["seed"]])[0]
        assert (row["completion"], row["n_tokens"], row["finished"]) == (drawn.text, drawn.n_tokens, drawn.finished)
        assert row["steps"] == task.split_steps(drawn.text)
        assert row["correct"] == world.verify(row["question"], drawn.text)
        assert row["question_id"] == task.question_id(row["question"])
        assert row["policy_id"] == world.engine.policy_id
        scores, states = world.prm.step_outputs([row["question"]], [[drawn.text]])[0][0]
        assert row["prm_step_scores"] == pytest.approx(scores.tolist(), abs=1e-5)
        assert torch.tensor(row["hidden_states"]).sub(states).abs().max() < 1e-4
        score, state = world.prm.question_state([row["question"]])
        assert row["question_score"] == pytest.approx(score.item(), abs=1e-5)
        assert row["question_hidden"] == pytest.approx(state[0].tolist(), abs=1e-4)


def test_labels_follow_from_the_counts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        n = len(row["steps"])
        assert row["step_trials"] == [16] * n
        assert row["step_successes"][-1] == 16 * row["correct"]
        assert row["step_labels"] == hard_labels(row["step_successes"], row["step_trials"])
        assert row["first_error"] == first_error(row["step_labels"])
        assert row["rollouts"] == 16 * (n - 1)
        assert row["question_trials"] == 16


def test_counts_are_reproducible_draws_of_the_engine(world: TinyWorld, rows: list[dict[str, Any]]) -> None:
    row = rows[5]
    seeds = [stream_seed(3, f"sample 1 step 0 rollout {r}", row["question_id"]) for r in range(16)]
    begun = row["steps"][0] + " "
    done = world.engine.sample([row["question"]] * 16, seeds, prefixes=[begun] * 16)
    assert sum(world.verify(row["question"], c.text) for c in done) == row["step_successes"][0]
    assert len({c.text for c in done}) > 1
    assert (
        rows
        == jobs.labeller(world, samples=2, rollouts=16, logprobs=True)(
            question_table([row["question"] for row in rows[::2]])
        ).to_pylist()
    )


def test_the_labels_agree_with_the_truth(world: TinyWorld) -> None:
    """k of n and the truth's K of N from other random numbers are draws of one binomial law, prefix by prefix."""
    questions = world.questions(45, seed=33, split="test")
    table = jobs.labeller(world, samples=1, rollouts=16, hidden_states=False)(question_table(questions))
    found = table.to_pylist()
    starts = [(r["question"], "", r["question_successes"]) for r in found]
    starts += [
        (r["question"], " ".join(r["steps"][: t + 1]), k) for r in found for t, k in enumerate(r["step_successes"][:-1])
    ]
    truth = world.true_success([q for q, _, _ in starts], [text for _, text, _ in starts], rollouts=64, seed=9)
    counts = [(k, int(other)) for (_, _, k), other in zip(starts, truth, strict=True)]
    assert len(counts) > 200
    ours, both = torch.tensor([(k, k + other) for k, other in counts]).numpy().T
    law = stats.hypergeom(80, both, 16)  # of k, given k + K (Fisher's exact test)
    assert min(law.cdf(ours).min(), law.sf(ours - 1).min()) > 0.0005 / len(counts)  # no single prefix is off
    difference = sum(k / 16 - other / 64 for k, other in counts)
    pooled = [(k + other) / 80 for k, other in counts]
    deviation = sum(p * (1 - p) * (1 / 16 + 1 / 64) for p in pooled) ** 0.5
    assert abs(difference) < 3.3 * deviation  # nor are they off together
    wrong = [other == 0 for _, other in counts]
    assert any(wrong)
    assert not all(wrong)


def test_bisection_finds_the_first_error_with_fewer_rollouts(
    world: TinyWorld, chunk: list[str], rows: list[dict[str, Any]]
) -> None:
    short = jobs.labeller(world, samples=2, rollouts=16, search="bisection")
    found = short(question_table(chunk)).to_pylist()
    assert sum(row["rollouts"] for row in found) < 0.5 * sum(row["rollouts"] for row in rows)
    for ours, every in zip(found, rows, strict=True):
        assert ours["completion"] == every["completion"]
        assert ours["question_successes"] == every["question_successes"]
        for k, n, whole in zip(ours["step_successes"], ours["step_trials"], every["step_successes"], strict=True):
            assert (k, n) in ((whole, 16), (0, 0))  # a rollout is the same whoever asks for it
        labels = every["step_labels"]
        if labels == sorted(labels, reverse=True):
            assert (ours["step_labels"], ours["first_error"]) == (labels, every["first_error"])


def test_log_probabilities_add_up_to_the_answers(world: TinyWorld, rows: list[dict[str, Any]]) -> None:
    for row in rows[:6]:
        drawn = world.engine.sample([row["question"]], [row["seed"]])[0]
        tokens = world.engine.logprobs([row["question"]], [drawn.token_ids])[0]
        steps = [len(step.split()) for step in row["steps"]]
        steps[-1] += 1  # the end token
        assert sum(steps) == len(tokens)
        assert row["step_logprobs"] == pytest.approx(
            [sum(tokens[sum(steps[:t]) : sum(steps[: t + 1])]) for t in range(len(steps))]
        )


def test_without_a_prm_and_without_rollouts(world: TinyWorld, chunk: list[str]) -> None:
    both = LabelSettings(samples=1, rollouts=3)
    table = Labeller(world.engine, world.verify, None, SplitAfter(";"), both)(question_table(chunk))
    assert not {"prm_step_scores", "question_score", "hidden_states"} & set(table.column_names)
    assert set(table.column("question_trials").to_pylist()) == {3}
    none = LabelSettings(samples=1, rollouts=0, hidden_states=False)
    table = Labeller(world.engine, world.verify, world.prm, SplitAfter(";"), none)(question_table(chunk))
    assert not {"step_successes", "step_labels", "rollouts", "hidden_states"} & set(table.column_names)
    assert table.column("prm_step_scores").null_count == 0


class Mute:
    """An engine whose answers have no text."""

    policy_id = "mute"

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        return [Completion(prompt, seed, "", (), 0, True) for prompt, seed in zip(prompts, seeds, strict=True)]


@pytest.mark.parametrize("search", ["exhaustive", "bisection"])
def test_answers_without_steps(world: TinyWorld, chunk: list[str], search: Any, tmp_path: Any) -> None:
    label = jobs.labeller(world, Mute(), search=search)
    run = label_questions(chunk[:1], tmp_path / "run", label, progress=False)
    row = run.table().to_pylist()[0]
    assert (row["steps"], row["prm_step_scores"], row["hidden_states"], row["step_successes"]) == ([], [], [], [])
    assert (row["first_error"], row["rollouts"], run.exhaustive, run.saved) == (-1, 0, 0, 0.0)


def test_the_prompt_goes_to_the_policy_and_the_question_to_the_others(world: TinyWorld, chunk: list[str]) -> None:
    asked: list[str] = []

    class Spy(Mute):
        def sample(self, prompts: Sequence[str], *rest: Any, **named: Any) -> list[Completion]:
            asked.extend(prompts)
            return super().sample(prompts, *rest, **named)

    def verify(question: str, completion: str) -> bool:
        assert question == chunk[0]
        return True

    label = Labeller(Spy(), verify, world.prm, SplitAfter(";"))
    table = label(pa.table({"question": chunk[:1], "prompt": ["<user>"], "question_id": ["7"], "answer": ["x"]}))
    assert set(asked) == {"<user>"}
    assert table.column("question_id").to_pylist() == ["7"] * 4


def test_a_labeller_travels_to_other_processes(world: TinyWorld, chunk: list[str]) -> None:
    label = jobs.labeller(world)
    table = question_table(chunk[:2])
    assert pickle.loads(pickle.dumps(label))(table).equals(label(table))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: question_table([]), ValueError, "questions must have at least one entry, got 0"),
        (lambda w: question_table("1 + 1"), TypeError, "got one string"),
        (lambda w: question_table(["a", ""]), ValueError, r"questions\[1\]: question must not be empty"),
        (lambda w: question_table(["a", None]), TypeError, r"questions\[1\]: question must be a string, got NoneType"),
        (lambda w: question_table(["a", "a"]), ValueError, r"questions\[1\]: question_id must appear once"),
        (lambda w: question_table(pa.table({"text": ["a"]})), ValueError, "must have a column question, got text"),
        (lambda w: question_table(pa.table({"question": pa.array([], pa.string())})), ValueError, "at least one entry"),
        (lambda w: LabelSettings(samples=0), ValueError, "samples must be at least 1, got 0"),
        (lambda w: LabelSettings(rollouts=-1), ValueError, "rollouts must be at least 0, got -1"),
        (lambda w: LabelSettings(seed=1.5), TypeError, "seed must be an int, got float"),
        (lambda w: LabelSettings(search="linear"), ValueError, "search must be exhaustive or bisection, got 'linear'"),
        (lambda w: LabelSettings(rule="most"), ValueError, "rule must be one of any, all, got 'most'"),
        (lambda w: Labeller(w.prm, w.verify), TypeError, r"engine must have policy_id and sample\(\), got TinyPRM"),
        (lambda w: Labeller(w.engine, w.verify, w.engine), TypeError, "scorer must have prm_id"),
        (lambda w: Labeller(w.engine, "math"), TypeError, "verifier must be callable, got str"),
        (lambda w: Labeller(Mute(), w.verify, settings=LabelSettings(logprobs=True)), TypeError, "got Mute"),
        (lambda w: Labeller(w.engine, w.verify, w.prm)(question_table(w.questions(1))), ValueError, "the same steps"),
        (lambda w: label_questions(["a"], "x", jobs.labeller(w), chunk_size=0), ValueError, "chunk_size must be at"),
        (lambda w: label_questions(["a"], "x", jobs.labeller(w), chunk_size=1.0), TypeError, "chunk_size must be an"),
    ],
)
def test_errors(world: TinyWorld, call: Callable[[TinyWorld], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(world)


def test_an_engine_that_loses_an_answer_is_found_out(world: TinyWorld, chunk: list[str]) -> None:
    class Lossy(Mute):
        def sample(self, *arguments: Any, **named: Any) -> list[Completion]:
            return super().sample(*arguments, **named)[:-1]

    with pytest.raises(RuntimeError, match=r"one completion per prompt \(24\), got 23"):
        jobs.labeller(world, Lossy())(question_table(chunk))
