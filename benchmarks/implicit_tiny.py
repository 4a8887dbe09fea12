"""Implicit reward models on the embedded tiny world: IPVRM against Implicit PRM and DPO-RM, from outcomes alone.

    python -m benchmarks.implicit_tiny --output benchmarks/results/implicit_tiny.json --plot implicit_tiny.png

Every method starts from the tiny policy, has it as its reference, and sees the same sampled answers (train split) with
whether they are right, or pairs of a right and a wrong one of them. All are judged on answers to unseen questions (test
split): rank correlation of the values of prefixes (all steps but the final answer) with the share of fresh rollouts
that succeed, pooled over all steps and within each question; F1 of the first wrong step, which the task knows exactly,
in both protocols of ProcessBench, at the threshold that is optimal for other questions (calibration split); best-of-n
by the value of the whole answer.

A prefix has two readings: the sum of its log-ratios (V_t, what Implicit PRM and DPO-RM train) and their mean per token
(v_t, what IPVRM trains). Both are shown for every method; beta scales them and changes no number here. The policy's own
log-likelihood, read the same two ways, is the untrained baseline.

Five seeds, mean and 95 % t-interval over seeds; five CPU minutes. Settings were chosen on seed 100 by answers to
questions of the calibration split (150 updates; mean of both pooled rank correlations, both F1 and BON@16): for each of
the three losses the best of six, rate 3e-5, 1e-4 or 3e-4 times beta 10 or 30 (IPVRM, margin 5), 0.5 or 2 (the others);
the three weightings of IPVRM share the setting that was best for uniform. A first look at rates of 1e-3 and 3e-3 was
worse for every loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.seeds import interval, mean_bars, run_seeds
from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.calibration.metrics import spearman
from prmfast.cli import wide_console
from prmfast.distrl.models import LanguageModel, collect
from prmfast.evaluation import (
    AnswerPool,
    best_of_n,
    first_error_metrics,
    first_errors,
    optimal_threshold,
    pass_at_n,
    step_rewards,
    trajectory_scores,
    vote_accuracies,
)
from prmfast.prm.losses import dpo_rm_loss, implicit_prm_loss, ipvrm_loss
from prmfast.prm.train.batches import LengthBuckets
from prmfast.tiny import TinyLearner, TinyWorld, task
from prmfast.tiny.prm import step_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
Report = dict[str, dict[str, float]]

WARM_UP = 10  # updates; then the rate falls to 0 on a line
PASS = 512  # answers of one forward pass without a graph
NS = (2, 4, 8, 16)
BASELINE = "policy log-likelihood"


@dataclass(frozen=True)
class Sizes:
    """Questions and answers to each of them; the defaults are those of the published table."""

    updates: int = 120
    batch: int = 64  # answers of an update, or half as many pairs
    train: tuple[int, int] = (960, 8)
    calibration: tuple[int, int] = (60, 16)
    test: tuple[int, int] = (120, 16)
    truth: tuple[int, int] = (60, 4)  # of the test answers, those whose prefixes are rolled out
    rollouts: int = 32


QUICK = Sizes(updates=4, batch=16, train=(40, 4), calibration=(10, 16), test=(10, 16), truth=(4, 2), rollouts=4)


@dataclass(frozen=True)
class Method:
    """A loss of padded log-ratios [B, T] with mask and labels, or ``paired`` of chosen and rejected ones."""

    loss: Callable[..., Tensor]
    rate: float
    paired: bool = False


METHODS = {
    **{
        f"IPVRM, {weighting}": Method(partial(ipvrm_loss, beta=30.0, margin=5.0, weighting=weighting), 1e-4)
        for weighting in ("uniform", "early", "late")
    },
    "Implicit PRM": Method(partial(implicit_prm_loss, beta=0.5), 1e-4),
    "DPO-RM": Method(partial(dpo_rm_loss, beta=2.0), 3e-4, paired=True),
}


@dataclass(frozen=True)
class Answers:
    """N sampled answers, the ``samples`` to one question side by side; the end token is not among the ids.

    correct: [N] float32, 1 or 0. logprob: of every answer the log-probabilities of its tokens under the policy.
    """

    prompts: list[str]
    texts: list[str]
    ids: list[tuple[int, ...]]
    correct: Tensor
    samples: int
    logprob: tuple[Tensor, ...]


def draw(world: TinyWorld, split: str, size: tuple[int, int], seed: int) -> Answers:
    questions, samples = size
    asked = world.questions(questions, seed, split=split)
    done = world.engine.sample(
        [question for question in asked for _ in range(samples)],
        [seed * samples + j for _ in asked for j in range(samples)],
    )
    prompts, texts = [one.prompt for one in done], [one.text for one in done]
    ids = [tuple(token for token in one.token_ids if token != task.EOS_ID) for one in done]
    correct = torch.tensor([float(world.verify(*one)) for one in zip(prompts, texts, strict=True)])
    return Answers(prompts, texts, ids, correct, samples, logprobs(TinyLearner(world.policy), prompts, ids))


def logprobs(model: LanguageModel, prompts: list[str], ids: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Log-probabilities of the tokens of each answer, without a graph."""
    found = collect(model, prompts, ids, PASS).logprob(packed(ids))
    parts: tuple[Tensor, ...] = found.split([len(row) for row in ids])
    return parts


def packed(ids: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor([token for row in ids for token in row])


def first_wrong(prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Index of each answer's first step that is not what the task demands, -1 if there is none (or no step at all)."""
    ids = torch.tensor([task.parse_question(prompt) for prompt in prompts])
    found = []
    for values, count, text in zip(
        task.true_results(ids).tolist(), task.number_of_steps(ids).tolist(), texts, strict=True
    ):
        expected = [*(f"{value} {task.STEP}" for value in values[:count]), f"{task.FINAL} {values[-1]}"]
        steps = task.split_steps(text)
        differs = [i for i, (step, wanted) in enumerate(zip(steps, expected, strict=False)) if step != wanted]
        complete = len(steps) == len(expected)
        found.append(differs[0] if differs else -1 if complete else len(steps) - 1)
    return found


def pairs(answers: Answers, seed: int) -> list[tuple[int, ...]]:
    """(right, wrong) answers to the same question, each answer once at most."""
    random = np.random.default_rng(seed)
    found: list[tuple[int, ...]] = []
    for start in range(0, len(answers.ids), answers.samples):
        right = answers.correct[start : start + answers.samples].numpy() == 1
        both = [start + random.permutation(np.flatnonzero(outcome)) for outcome in (right, ~right)]
        found += zip(*(side.tolist() for side in both), strict=False)
    return found


def batches(lengths: Sequence[int], size: int, updates: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of ``updates`` batches of like length, epoch after epoch."""
    buckets = LengthBuckets(lengths, size, seed=seed)
    done = 0
    while done < updates:
        order = torch.tensor(list(buckets)).view(-1, size)[: updates - done]
        for rows in order.tolist():
            yield [row for row in rows if row < len(lengths)]
        done += len(order)
        buckets.epoch += 1


def train(world: TinyWorld, method: Method, answers: Answers, sizes: Sizes, seed: int) -> TinyLearner:
    model = TinyLearner(world.policy)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=method.rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / sizes.updates)
    )
    units = pairs(answers, seed) if method.paired else [(row,) for row in range(len(answers.ids))]
    size = sizes.batch // 2 if method.paired else sizes.batch
    lengths = [max(len(answers.ids[row]) for row in unit) for unit in units]
    for batch in batches(lengths, size, sizes.updates, seed):
        rows = [row for column in zip(*(units[i] for i in batch), strict=True) for row in column]
        loss = batch_loss(model, method, answers, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model


def batch_loss(model: LanguageModel, method: Method, answers: Answers, rows: list[int]) -> Tensor:
    """Of the answers ``rows``; of pairs, the right ones stand before the wrong ones."""
    ids = [answers.ids[row] for row in rows]
    lengths = [len(row) for row in ids]
    logprob = model.outputs([answers.prompts[row] for row in rows], ids).logprob(packed(ids))
    ratio = pad_sequence((logprob - torch.cat([answers.logprob[row] for row in rows])).split(lengths), batch_first=True)
    mask = torch.arange(ratio.shape[1]) < torch.tensor(lengths)[:, None]
    if not method.paired:
        return method.loss(ratio, answers.correct[rows], mask=mask)
    (chosen, rejected), (chosen_mask, rejected_mask) = ratio.chunk(2), mask.chunk(2)
    return method.loss(chosen, rejected, chosen_mask=chosen_mask, rejected_mask=rejected_mask)


@dataclass(frozen=True)
class Truth:
    """Success probability [P] of P prefixes of test answers: answer and step of each, and its question."""

    places: list[tuple[int, int]]
    question: npt.NDArray[np.str_]
    success: Array


@dataclass(frozen=True)
class Judged:
    """Answers of the splits "calibration" and "test", their first wrong steps, and the truth about test prefixes."""

    answers: dict[str, Answers]
    first_wrong: dict[str, list[int]]
    truth: Truth


def rolled_out(world: TinyWorld, answers: Answers, sizes: Sizes, seed: int) -> Truth:
    questions, samples = sizes.truth
    places, starts = [], []
    for row in (q * answers.samples + j for q in range(questions) for j in range(samples)):
        steps = task.split_steps(answers.texts[row])
        for t in range(len(steps) - 1):
            places.append((row, t))
            starts.append((answers.prompts[row], " ".join(steps[: t + 1])))
    distinct = list(dict.fromkeys(starts))
    prompts, prefixes = [list(column) for column in zip(*distinct, strict=True)]
    counts = world.true_success(prompts, prefixes, rollouts=sizes.rollouts, seed=seed).tolist()
    known = dict(zip(distinct, counts, strict=True))
    success = np.array([known[start] for start in starts]) / sizes.rollouts
    return Truth(places, np.array([prompt for prompt, _ in starts]), success)


def judge(scores: dict[str, list[Tensor]], judged: Judged) -> dict[str, float]:
    """Every number of one method from its scores of the tokens of the calibration and test answers."""
    test, truth = judged.answers["test"], judged.truth
    ends = {
        split: [[end - 1 for end in step_ends(text)] for text in some.texts] for split, some in judged.answers.items()
    }

    def read(split: str, **reading: Any) -> list[Array]:
        return [step_rewards(row, at, **reading) for row, at in zip(scores[split], ends[split], strict=True)]

    values = {"mean": read("test", average=True), "sum": read("test")}
    report: dict[str, float] = {}
    for name, of in values.items():
        at = np.array([of[answer][step] for answer, step in truth.places])
        report[f"spearman, {name}"] = spearman(at, truth.success)
        inside = [
            spearman(at[mine], truth.success[mine])
            for mine in (truth.question == question for question in np.unique(truth.question))
        ]
        report[f"spearman within, {name}"] = float(np.nanmean(inside))  # NaN where a question's prefixes are all alike
    for protocol in ("prefix", "process"):
        chains = {}
        for split, labels in judged.first_wrong.items():
            of = read(split, protocol=protocol)
            kept = [i for i, value in enumerate(of) if len(value)]
            chains[split] = [of[i].tolist() for i in kept], [labels[i] for i in kept]
        found = first_errors(chains["test"][0], optimal_threshold(*chains["calibration"]))
        report[f"F1, {protocol}"] = first_error_metrics(found, chains["test"][1]).f1
    whole = trajectory_scores([of.tolist() for of in values["sum"]], "last")
    return report | over_questions(test, lambda rows, n: best_of_n(whole[rows], test.correct[rows], n))


def over_questions(answers: Answers, accuracy: Callable[[slice, int], float]) -> dict[str, float]:
    """BON@n: the mean over questions of ``accuracy(answers to the question, n)``."""
    rows = [slice(start, start + answers.samples) for start in range(0, len(answers.ids), answers.samples)]
    return {f"BON@{n}": float(np.mean([accuracy(mine, n) for mine in rows])) for n in NS if n <= answers.samples}


def choices(answers: Answers, seed: int) -> Report:
    """What choosing among n answers comes to without a model."""

    def majority(rows: slice, n: int) -> float:
        final = tuple(task.final_answer(text) for text in answers.texts[rows])
        pool = AnswerPool(answers.prompts[rows.start], tuple(answers.correct[rows].bool().tolist()), {}, final)
        return vote_accuracies(pool, n, trials=20, seed=seed)["majority"]

    return {
        "random answer": over_questions(answers, lambda rows, n: float(answers.correct[rows].mean())),
        "majority": over_questions(answers, majority),
        "pass@n": over_questions(answers, lambda rows, n: pass_at_n(answers.correct[rows], n)),
    }


def run_seed(seed: int, sizes: Sizes = Sizes()) -> Report:
    world = TinyWorld.load()
    learned = draw(world, "train", sizes.train, seed)
    answers = {split: draw(world, split, getattr(sizes, split), seed) for split in ("calibration", "test")}
    judged = Judged(
        answers,
        {split: first_wrong(some.prompts, some.texts) for split, some in answers.items()},
        rolled_out(world, answers["test"], sizes, seed),
    )
    report = {}
    for name, method in METHODS.items():
        model = train(world, method, learned, sizes, seed)
        scores = {
            split: [a - b for a, b in zip(logprobs(model, some.prompts, some.ids), some.logprob, strict=True)]
            for split, some in answers.items()
        }
        report[name] = judge(scores, judged)
    report[BASELINE] = judge({split: list(some.logprob) for split, some in answers.items()}, judged)
    return report | choices(answers["test"], seed)


def show(runs: Sequence[Report], console: Console) -> None:
    for title, columns in (
        ("rank correlation of prefix values with Monte-Carlo truth", [c for c in runs[0][BASELINE] if "spearman" in c]),
        ("first wrong step and best-of-n", [c for c in runs[0][BASELINE] if "spearman" not in c]),
    ):
        table = Table("", title=f"{title}; unseen questions, mean ± 95 % over {len(runs)} seeds")
        for column in columns:
            table.add_column(column, justify="right")
        for name, row in runs[0].items():
            if any(column in row for column in columns):
                cells = [interval([run[name][c] for run in runs]) if c in row else "" for c in columns]
                table.add_row(name, *cells, end_section=name == list(METHODS)[-1])
        console.print(table)


def figure_of(runs: Sequence[Report]) -> Figure:
    """Rank correlation, F1 and best-of-n of every method."""
    from prmfast.calibration.plots import line_style, new_figure

    figure, axes = new_figure(1, 3, width=5.6)
    names = [*METHODS, BASELINE]
    for axis, columns, title in (
        (axes[0], ("spearman, mean", "spearman, sum", "spearman within, sum"), "Prefix values against truth"),
        (axes[1], ("F1, prefix", "F1, process"), "First wrong step"),
    ):
        for i, column in enumerate(columns):
            mean, half = mean_bars([[run[name][column] for run in runs] for name in names])
            place = np.arange(len(names)) + 0.12 * (i - (len(columns) - 1) / 2)
            axis.errorbar(mean, place, xerr=half, linestyle="", capsize=2, label=column, **line_style(i))
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(title=title, xlabel="rank correlation" if columns[0].startswith("spearman") else "F1")
        axis.legend(fontsize=8, frameon=False)
    bounds = {"random answer": {"color": "#555555", "linestyle": ":"}, "pass@n": {"color": "black", "linestyle": "--"}}
    ns = [int(column.removeprefix("BON@")) for column in runs[0]["pass@n"]]
    for i, name in enumerate(runs[0]):
        mean, half = mean_bars([[run[name][f"BON@{n}"] for run in runs] for n in ns])
        beside = np.array(ns) * 2.0 ** (0.04 * (i - len(runs[0]) / 2))  # bars side by side
        style = bounds.get(name) or line_style(i)
        axes[2].errorbar(beside, mean, half, linewidth=1.3, elinewidth=0.6, label=name, **style)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(ns, [str(n) for n in ns])
    axes[2].set(title="Best of n", xlabel="answers n (log scale)", ylabel="questions answered rightly (share)")
    axes[2].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="processes that share the seeds; default: one per core")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, proves nothing")
    parser.add_argument("--output", type=Path, help="JSON with every seed's numbers")
    parser.add_argument("--plot", type=Path, help="PNG of the tables")
    arguments = parser.parse_args(argv)
    machine = describe()  # before the first run: the commit that it ran from
    sizes = QUICK if arguments.quick else Sizes()
    runs = run_seeds(partial(run_seed, sizes=sizes), range(arguments.seeds), jobs=arguments.jobs)
    console = wide_console()
    show(runs.results, console)
    console.print(f"{runs.cpu_seconds:.0f} CPU seconds", highlight=False)
    if arguments.output is not None:
        write_json(arguments.output, {"machine": machine, "cpu_seconds": runs.cpu_seconds, "seeds": runs.results})
        console.print(f"written: {arguments.output}", highlight=False)
    if arguments.plot is not None:
        from prmfast.calibration.plots import save

        save(figure_of(runs.results), arguments.plot)
        console.print(f"written: {arguments.plot}", highlight=False)


if __name__ == "__main__":
    main()
