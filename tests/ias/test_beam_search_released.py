"""Beam search against the recorded decisions of the released program of [U]."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from prmfast.engines import Completion, StepScores
from prmfast.ias import BeamSearch, BeamSearchResult, BeamSettings, has_boxed_answer


class FakeEngine:
    """The fake LLM of the vectors as an engine: rows with seeds 42, 43, ... of one prompt are one call's n samples."""

    policy_id = "fake"
    stop = ("\n\n",)

    def __init__(self, fakes: ModuleType, template: str) -> None:
        self.llm, self.tokens, self.template = fakes.FakeLLM(), fakes.tokens, template

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        assert prefixes is not None
        starts = [i for i, seed in enumerate(seeds) if seed == 42]
        runs = [range(a, b) for a, b in zip(starts, [*starts[1:], len(seeds)], strict=True)]
        assert [seed - 42 for seed in seeds] == [i - run.start for run in runs for i in run]
        drawn: dict[int, Completion] = {}
        for n in sorted({len(run) for run in runs}):
            some = [run for run in runs if len(run) == n]
            texts = [self.template.replace("{input}", prompts[r.start]) + prefixes[r.start] for r in some]
            outputs = self.llm.generate(texts, SimpleNamespace(n=n, seed=42))
            for run, output in zip(some, outputs, strict=True):
                for i, one in zip(run, output.outputs, strict=True):
                    new, whole = len(self.tokens(one.text)), prefixes[i] + one.text
                    ended = one.text != "out of tokens"
                    drawn[i] = Completion(prompts[i], seeds[i], whole, (0,) * new, new, ended, one.stop_reason)
        return [drawn[i] for i in range(len(prompts))]


class FakeJudge:
    """The fake PRM of the vectors as a judge, of the last step only; [q10, q50, q90] where it has quantiles."""

    prm_id = "fake"

    def __init__(self, fakes: ModuleType, quantiles: bool) -> None:
        self.prm = fakes.FakePRM(quantiles)

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        rows = [row[0][0] for row in self.prm.score(questions, [[answer or ""] for answer in answers])]
        if not self.prm.q:
            return [StepScores((score,)) for score in rows]
        return [StepScores((row[1],), torch.tensor([row])) for row in rows]


def settings_of(argv: Sequence[str]) -> BeamSettings:
    """The released flags; a later one wins."""
    values = {flag[2:]: value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag.startswith("--")}
    return BeamSettings(
        n_generations=int(values["n_generations"]),
        beam_width=int(values["beam_width"]),
        freq=int(values["freq"]),
        max_steps=int(values["max_steps"]),
        ias="M" if "interleave_M" in values else "K" if "interleave_K" in values else "fixed",
        lb_idx=int(values["lb_idx"]) if "lb_idx" in values else None,
    )


def decisions(result: BeamSearchResult, pruned_at: Sequence[int]) -> list[dict[str, list[int]]]:
    """K and M of all questions, prune by prune; a question that has stopped keeps its last ones."""
    made = {(step.question, step.step): step for step in result.steps if step.k is not None}
    rows = []
    for at in pruned_at:
        last = [
            made[q, max(step for question, step in made if question == q and step <= at)]
            for q in range(len(result.answers))
        ]
        rows.append({"K": [int(step.k or 0) for step in last]})
        rows.append({"M": [int(step.m or 0) for step in last], "beams": [step.beams for step in last]})
    return rows


def test_released_trace(shared_vectors: Path) -> None:
    trace = json.loads((shared_vectors / "calprm_beam_trace.json").read_text())
    template = json.loads((shared_vectors / "calprm_text.json").read_text())["prompt_format"][trace["model_id"]]
    spec = importlib.util.spec_from_file_location("fake_llm", shared_vectors / "fake_llm.py")
    assert spec is not None
    assert spec.loader is not None
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    questions = [entry["problem"] for entry in trace["questions"]]
    assert {run["name"] for run in trace["runs"]} == {"fixed", "M", "wql_fixed", "wql_M_lb0", "freq1_K", "maxsteps3"}
    for run in trace["runs"]:
        shape = settings_of(run["argv"])
        engine, judge = FakeEngine(fakes, template), FakeJudge(fakes, "--prm_peft_dir" in run["argv"])
        search = BeamSearch(engine, judge, shape, seed=42, variant="released")
        result = search.run(questions, progress=False)
        assert decisions(result, range(shape.freq, shape.max_steps + 1, shape.freq)) == run["decisions"], run["name"]
        for q, expected in enumerate(run["results"]):
            assert [result.answers[q].completion] == expected["generations"], run["name"]
            padding = [0] * (shape.max_steps - result.answers[q].steps)
            assert result.counts("generations")[q] + padding == expected["generation_cnts"], run["name"]
            assert result.counts("n_tokens")[q] + padding == expected["generation_token_cnts"], run["name"]
        assert engine.llm.n_calls == run["llm_generate_calls"], run["name"]
        assert engine.llm.n_samples == result.generations == run["llm_samples"], run["name"]
        assert judge.prm.n_scored == result.scored == run["prm_scored"], run["name"]


def test_what_counts_as_a_boxed_answer(shared_vectors: Path) -> None:
    known = json.loads((shared_vectors / "calprm_text.json").read_text())["contains_boxed"]
    assert {text: has_boxed_answer(text) for text in known} == known
