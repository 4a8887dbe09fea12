"""DistRL on the embedded tiny world: accuracy at equal rollouts, its options, and calibration of a policy that moved.

    python -m benchmarks.distrl_tiny --output distrl_tiny.json --plot distrl_tiny.png

Every method trains the shipped policy on 24 questions x 8 answers a step. Reward models begin as models trained
offline on answers of the start policy (as the paper does; begun as a copy of the policy they order 53 to 57 % of the
pairs of answers of a question in the first 30 steps); those answers count as rollouts. Accuracy: share of correct
answers to unseen questions. Tuned on seed 100, outside of the five reported ones: GRPO in six runs (policy rate),
DistRL + IPVRM in seven (policy rate, TD weight), DistRL + implicit PRM in two; GRPO + IPVRM takes DistRL's values. With
the paper's TD weight 1 a summed, normalised TD is several times the outcome's advantage.
Label imbalance: training questions that the start policy mostly fails, or
mostly solves. Mean and 95 % t-interval over seeds; two processes, about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.distrl_tiny_report import plot, show
from benchmarks.seeds import run_seeds
from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.calibration import CalibrationData, CondOTCalibrator, metrics
from prmfast.calibration.base import LEVELS
from prmfast.cli import wide_console
from prmfast.distrl import AdvantageRule, Loop, LoopConfig, LossRule, pairwise_accuracy
from prmfast.distrl.models import collect, descend
from prmfast.distrl.rollouts import Rollouts, draw
from prmfast.engines import Engine
from prmfast.ops import ias_budget
from prmfast.prm.losses import implicit_prm_loss, ipvrm_loss
from prmfast.tiny import TinyLearner, TinyWorld

POLICY_RATE, REWARD_RATE, TD_WEIGHT = 3e-4, 2e-4, 0.1
OFFLINE_RATE, OFFLINE_EPOCHS, OFFLINE_QUESTIONS = 2e-3, 5, 32  # questions of a minibatch
TARGET, N_MAX, TRUTH = 0.9, 16, 64
FAMILIES = ("ipvrm", "implicit")


@dataclass(frozen=True)
class Sizes:
    """prompts, samples: of a step. steps: of GRPO; the others run ``offline`` steps fewer, whose rollouts are those of
    their reward model's offline training. sweep, imbalance: steps of these runs. every: steps between evaluations.
    pool: questions to train on; test: to evaluate on, ``answers`` each; calibration: to calibrate on.
    """

    prompts: int = 24
    samples: int = 8
    steps: int = 40
    offline: int = 10
    sweep: int = 15
    imbalance: int = 12
    every: int = 5
    pool: int = 1500
    test: int = 300
    answers: int = 4
    calibration: int = 300


@dataclass(frozen=True)
class Cell:
    """One run: of a group of runs, the name of what differs, and which questions ("all", "mostly wrong" or "mostly
    right" answers of the start policy) it trains on.
    """

    group: str
    name: str
    config: LoopConfig
    steps: int
    questions: str = "all"


def cells(sizes: Sizes) -> list[Cell]:
    """Of one seed. DistRL + IPVRM of "methods" is the centre of every sweep."""
    size: dict[str, Any] = {"prompts": sizes.prompts, "samples": sizes.samples, "policy_rate": POLICY_RATE}
    rates = size | {"reward_rate": REWARD_RATE, "advantage": AdvantageRule(td_weight=TD_WEIGHT)}
    centre, online = LoopConfig.distrl_ipvrm(**rates), sizes.steps - sizes.offline
    found = [
        Cell("methods", "GRPO", LoopConfig.grpo(**size), sizes.steps),
        Cell("methods", "GRPO + IPVRM", LoopConfig.grpo_ipvrm(**rates), online),
        Cell("methods", "DistRL + IPVRM", centre, online),
        Cell("methods", "DistRL + implicit PRM", LoopConfig.distrl_implicit(**rates), online),
        Cell("reference", "fixed", replace(centre, reference="fixed"), sizes.sweep),
        Cell("td_weight", "1", replace(centre, advantage=AdvantageRule()), sizes.sweep),
    ]
    found += [Cell("p_min", f"{p:g}", replace(centre, p_min=p), sizes.sweep) for p in (0.02, 0.3)]
    found += [Cell("alpha", f"{a:g}", replace(centre, loss=LossRule(alpha=a)), sizes.sweep) for a in (0.5, 2.0)]
    for kind in ("mostly wrong", "mostly right"):
        for name, adb, dlw in (("naive", 0, 0), ("ADB", 1, 0), ("DLW", 0, 1), ("both", 1, 1)):
            config = replace(centre, adb=bool(adb), dlw=bool(dlw))
            found.append(Cell("imbalance", name, config, sizes.imbalance, kind))
    return found


def log_ratios(model: TinyLearner, base: Tensor, rows: Rollouts) -> Tensor:
    """log phi - ``base`` of packed tokens [N] as [S, T], 0 at padding."""
    packed = collect(model, rows.prompts, rows.answers, None).logprob(rows.token_ids) - base
    return pad_sequence(packed.split(rows.length.tolist()), batch_first=True)


def valid(rows: Rollouts) -> Tensor:
    """Mask [S, T] of their tokens."""
    return torch.arange(int(rows.length.max())) < rows.length[:, None]


def prepared(seed: int, *, sizes: Sizes, directory: Path) -> None:
    """What the runs of a seed share, saved: questions of every kind, and reward models trained offline."""
    world = TinyWorld.load()
    pool = world.questions(sizes.pool, seed, split="train")
    share = world.true_success(pool, rollouts=8, seed=seed) / 8
    chosen = {"all": share >= 0, "mostly wrong": share <= 0.25, "mostly right": share >= 0.875}
    kinds = {kind: [q for q, keep in zip(pool, mask.tolist(), strict=True) if keep] for kind, mask in chosen.items()}
    write_json(directory / f"questions-{seed}.json", kinds)
    offline(world, seed, sizes, directory)


def offline(world: TinyWorld, seed: int, sizes: Sizes, directory: Path) -> None:
    """Trains one reward model of every family on the same answers of the start policy."""
    asked = world.questions(sizes.prompts * sizes.offline, 1000 + seed, split="train")
    rows = draw(world.engine, asked, [sizes.samples] * len(asked), world.verify, first_seed=(seed + 1) * 10**6)
    start = collect(TinyLearner(world.policy), rows.prompts, rows.answers, None).logprob(rows.token_ids)
    start_of = start.split(rows.length.tolist())
    for family in FAMILIES:
        config = LoopConfig.distrl_ipvrm() if family == "ipvrm" else LoopConfig.distrl_implicit()
        model, generator = TinyLearner(world.policy), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=OFFLINE_RATE, weight_decay=0.0)
        total = OFFLINE_EPOCHS * math.ceil(len(asked) / OFFLINE_QUESTIONS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda k, total=total: min(1.0, (k + 1) / 10) * (1 - k / total),  # type: ignore[misc]
        )
        for _ in range(OFFLINE_EPOCHS):
            for part in torch.randperm(len(asked), generator=generator).split(OFFLINE_QUESTIONS):
                index = torch.isin(rows.group, part).nonzero()[:, 0]
                some, base = rows.take(index), torch.cat([start_of[i] for i in index.tolist()])
                optimizer.zero_grad()
                descend(model, some.prompts, some.answers, partial(offline_loss, config, some, base), None)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        torch.save(dict(model.state_dict()), directory / f"{family}-{seed}.pt")


def offline_loss(config: LoopConfig, rows: Rollouts, base: Tensor, phi: Any) -> Tensor:
    packed = phi.logprob(rows.token_ids) - base
    table, mask = pad_sequence(packed.split(rows.length.tolist()), batch_first=True), valid(rows)
    if config.reward == "ipvrm":
        return ipvrm_loss(table, rows.outcome, mask=mask, beta=config.beta, margin=config.margin)
    return implicit_prm_loss(table, rows.outcome, mask=mask, beta=config.beta)


def run(number: int, *, sizes: Sizes, seeds: Sequence[int], directory: Path) -> dict[str, Any]:
    """Cell ``number`` of all seeds' cells, those of a seed together."""
    every = cells(sizes)
    seed, cell = seeds[number // len(every)], every[number % len(every)]
    world, started = TinyWorld.load(), time.process_time()
    asked = json.loads((directory / f"questions-{seed}.json").read_text())[cell.questions]
    policy, reward_model = TinyLearner(world.policy), None
    config = replace(cell.config, seed=seed)
    if config.reward != "none":
        reward_model = TinyLearner(world.policy)
        reward_model.load_state_dict(torch.load(directory / f"{config.reward}-{seed}.pt", weights_only=True))
    loop = Loop(policy, policy.engine, asked, world.verify, config=config, reward_model=reward_model)
    test = world.questions(sizes.test, 2000 + seed)
    before = 0 if reward_model is None else sizes.offline * sizes.prompts * sizes.samples
    curve = [(before, accuracy(world, policy, test, sizes.answers))]
    for step in range(1, cell.steps + 1):
        loop.advance()
        if step % sizes.every == 0 or step == cell.steps:
            drawn = before + step * sizes.prompts * sizes.samples
            curve.append((drawn, accuracy(world, policy, test, sizes.answers)))
    report: dict[str, Any] = {"group": cell.group, "name": cell.name, "questions": cell.questions, "seed": seed}
    report |= {"curve": curve, "outcome": [record["outcome"] for record in loop.history]}
    for name in ("rm_pairwise_accuracy", "rm_score", "td_outcome_correlation", "sigma_v", "dist_candidates_per_token"):
        report[name] = [record.get(name) for record in loop.history]
    if cell.group == "imbalance":
        report["reward_model"] = judged(world, loop, test, sizes)
    if (cell.group, cell.name) == ("methods", "DistRL + IPVRM"):
        report["calibration"] = calibration(world, policy, seed, sizes)
    return report | {"cpu_seconds": time.process_time() - started}


def accuracy(world: TinyWorld, policy: TinyLearner, questions: Sequence[str], answers: int) -> float:
    return float(successes(world, policy.engine(), questions, answers, 0).double().mean()) / answers


def successes(world: TinyWorld, engine: Engine, questions: Sequence[str], rollouts: int, first: int) -> Tensor:
    """How many of ``rollouts`` answers of each question are correct, int64."""
    asked = [question for question in questions for _ in range(rollouts)]
    drawn = engine.sample(asked, [first + i for i in range(rollouts)] * len(questions))
    right = [world.verify(question, one.text) for question, one in zip(asked, drawn, strict=True)]
    return torch.tensor(right).view(len(questions), rollouts).sum(1)


@torch.no_grad()
def judged(world: TinyWorld, loop: Loop, questions: Sequence[str], sizes: Sizes) -> dict[str, float]:
    """The online reward model on fresh answers of the policy to questions of every kind."""
    assert isinstance(loop.policy, TinyLearner)
    assert isinstance(loop.reward_model, TinyLearner)
    rows = draw(loop.policy.engine(), questions, [sizes.samples] * len(questions), world.verify, first_seed=10**7)
    old = collect(loop.policy, rows.prompts, rows.answers, None).logprob(rows.token_ids)
    value = loop.config.beta * log_ratios(loop.reward_model, old, rows).sum(1) / rows.length.clamp(min=1)
    return {
        "pairwise": pairwise_accuracy(value, rows.outcome, group=rows.group),
        "brier": metrics.brier(value.sigmoid().numpy(), rows.outcome.numpy()),
        "correct": float(rows.outcome.mean()),
    }


def calibration(world: TinyWorld, policy: TinyLearner, seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Budgets for a target, from a calibrator of the start policy, before and after training, and from a new one.

    The PRM stays as it is. Each budget's success is what it would be in expectation, from 64 rollouts of a question.
    """
    asked = {split: world.questions(sizes.calibration, 3000 + seed, split=split) for split in ("calibration", "test")}
    engines: dict[str, Engine] = {"start": world.engine, "trained": policy.engine()}

    def data(policy_name: str, split: str, rollouts: int) -> CalibrationData:
        score, hidden = world.prm.question_state(asked[split])
        found = successes(world, engines[policy_name], asked[split], rollouts, 10**8)
        trials = torch.full_like(found, rollouts)
        return CalibrationData.from_arrays(
            score=score, hidden=hidden, successes=found, trials=trials, question=asked[split]
        )

    fitted = {
        name: CondOTCalibrator(steps=200, seed=seed).fit(data(name, "calibration", 8), progress=False)
        for name in engines
    }
    truth = {name: data(name, "test", TRUTH) for name in engines}
    rows = []
    for of, judged_on in (("start", "start"), ("start", "trained"), ("trained", "trained")):
        calibrator, at = fitted[of], truth[judged_on]
        quantiles = calibrator.quantile(at, [(i + 0.5) / 20 for i in range(20)])
        budget = ias_budget(quantiles, TARGET, N_MAX)
        rows.append(
            {
                "calibrator of": of,
                "policy": judged_on,
                "accuracy": float(at.target.mean()),
                "bias": float((calibrator.expected(at) - at.target).mean()),
                "area": metrics.calibration_area(calibrator.quantile(at, LEVELS).numpy(), at.target.numpy()),
                "mean_n": float(budget.double().mean()),
                "success": float((1 - all_wrong(at.successes, budget)).mean()),
            }
        )
    return rows


def all_wrong(correct: Tensor, drawn: Tensor) -> Tensor:
    """Probability [B] that ``drawn`` [B] of 64 rollouts, ``correct`` [B] of them right, hold no right one."""
    wrong, n = (TRUTH - correct).double(), drawn.double()
    left = (wrong - n).clamp(min=0)
    log = (wrong + 1).lgamma() - (left + 1).lgamma() + (TRUTH + 1 - n).lgamma() - math.lgamma(TRUTH + 1)
    return torch.where(n <= wrong, log.exp(), 0.0)


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, help="worker processes; default: one per core")
    parser.add_argument("--output", type=Path, help="JSON with every run")
    parser.add_argument("--plot", type=Path, help="PNG of the accuracy curves")
    parsed, sizes = parser.parse_args(arguments), sizes or Sizes()
    machine = describe()  # before the first run: the commit that it ran from
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        first = run_seeds(
            partial(prepared, sizes=sizes, directory=directory),
            parsed.seeds,
            jobs=parsed.jobs,
            description="reward models",
        )
        numbers = range(len(parsed.seeds) * len(cells(sizes)))
        of_cell = partial(run, sizes=sizes, seeds=parsed.seeds, directory=directory)
        runs = run_seeds(of_cell, numbers, jobs=parsed.jobs, description="runs")
    report = {
        "machine": machine,
        "cpu_seconds": first.cpu_seconds + runs.cpu_seconds,
        "seconds": time.perf_counter() - started,
        "sizes": asdict(sizes),
        "settings": {"policy_rate": POLICY_RATE, "reward_rate": REWARD_RATE, "td_weight": TD_WEIGHT, "target": TARGET},
        "cells": runs.results,
    }
    console = wide_console()
    show(report, console)
    if parsed.output is not None:
        write_json(parsed.output, report)
    if parsed.plot is not None:
        plot(report, parsed.plot)
    for path in filter(None, (parsed.output, parsed.plot)):
        console.print(f"written: {path}", highlight=False)


if __name__ == "__main__":
    main()
