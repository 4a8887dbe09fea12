"""What a step of DistRL costs beside a GRPO step of the plain implementation, by phase, at V = 151,936.

    python -m benchmarks.distrl_cost --output benchmarks/results/distrl_cost.json

Both train a Qwen2-architecture model (2 layers, 256 wide, tied output layer, random weights, float32) on the same
answers with AdamW; the answers are at hand when a step begins. Plain: the logits of every position in, log-softmax over
[B, T, V], gather, mask; once for log pi_old, once for the update. "plain, answers": the same with logits of the
answers' positions alone. Ours: `Loop` as `LoopConfig.distrl_ipvrm` (with its reward model's update) and
`LoopConfig.grpo`. Two batches: answers of 16 to 48 tokens, as policies give them, and answers of 48 tokens each,
where nothing is padded. The methods take turns, in rounds, each time in a process of its own: a warm-up step, then the
median of some. A ratio is of one round's; the median over rounds is given, with the smallest and the largest. Memory is
the peak of a process beyond what was resident before the models were made (on a GPU what torch held): weights,
optimizers, step. Runs on a GPU with ``--device cuda``.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prmfast._files import write_json
from prmfast._progress import progress
from prmfast.bench.machine import describe
from prmfast.bench.memory import resident_bytes
from prmfast.cli import wide_console
from prmfast.distrl import HuggingFaceModel, Loop, LoopConfig
from prmfast.distrl.phases import Phases
from prmfast.engines import Completion

PLAIN, DISTRL = "plain GRPO", "DistRL"
METHODS = (PLAIN, "plain GRPO, answers", "GRPO", DISTRL)
BATCHES = {"answers of 16 to 48 tokens": (16, 48), "answers of 48 tokens": (48, 48)}
PHASES = ("old", "reward", "advantages", "policy")
RATE = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch; ``shortest``, ``longest``: answers."""

    vocabulary: int = 151_936
    width: int = 256
    layers: int = 2
    prompts: int = 4
    samples: int = 4
    prompt: int = 16
    shortest: int = 16
    longest: int = 48
    steps: int = 2


class Batch:
    """The same prompts, answers and outcomes for every method; an engine, a tokenizer and a verifier for `Loop`."""

    policy_id = "benchmark"

    def __init__(self, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(0)

        def tokens(n: int) -> tuple[int, ...]:
            return tuple(torch.randint(sizes.vocabulary, (n,), generator=generator).tolist())

        self.questions = [" ".join(map(str, tokens(sizes.prompt))) for _ in range(sizes.prompts)]
        lengths = torch.linspace(sizes.shortest, sizes.longest, sizes.prompts * sizes.samples).long().tolist()
        self.answers = {
            question: [tokens(n) for n in lengths[i :: sizes.prompts]] for i, question in enumerate(self.questions)
        }

    def __call__(self, prompt: str) -> dict[str, list[int]]:
        """As a tokenizer."""
        return {"input_ids": [int(word) for word in prompt.split()]}

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """As an engine: the answers of a prompt in their order, whatever the seeds."""
        order = {question: iter(range(len(answers))) for question, answers in self.answers.items()}
        numbers = [(prompt, next(order[prompt])) for prompt in prompts]
        return [
            Completion(prompt, seed, str(i), self.answers[prompt][i], len(self.answers[prompt][i]), True)
            for (prompt, i), seed in zip(numbers, seeds, strict=True)
        ]

    def verify(self, question: str, completion: str) -> bool:
        """Every other answer is correct."""
        return int(completion) % 2 == 0


def language_model(sizes: Sizes, device: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config).to(device)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.05)  # beside the sampled token about one passes p_min
    return model


class PlainGRPO:
    """A GRPO step as it is commonly written: dense log-softmax of the logits that the model gives."""

    def __init__(self, batch: Batch, sizes: Sizes, device: str, *, answers_only: bool) -> None:
        self.model, self.device = language_model(sizes, device), device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)
        rows = [
            (batch(q)["input_ids"], answer, i) for q in batch.questions for i, answer in enumerate(batch.answers[q])
        ]
        width = sizes.prompt + sizes.longest
        self.ids, self.seen = torch.zeros(2, len(rows), width, dtype=torch.int64, device=device)
        for ids, seen, (prompt, answer, _) in zip(self.ids, self.seen, rows, strict=True):
            ids[: sizes.prompt + len(answer)] = torch.tensor([*prompt, *answer])
            seen[: sizes.prompt + len(answer)] = 1
        self.first = sizes.prompt if answers_only else 1
        self.mask = self.seen[:, self.first :].clone()
        self.mask[:, : sizes.prompt - self.first] = 0
        outcome = torch.tensor([float(batch.verify("", str(i))) for *_, i in rows], device=device)
        of_prompt = outcome.view(sizes.prompts, sizes.samples)
        spread = of_prompt.std(1, correction=0, keepdim=True)
        self.advantage = ((of_prompt - of_prompt.mean(1, keepdim=True)) / spread).view(-1, 1)

    def logp(self) -> Tensor:
        """log pi of the tokens from ``first`` on, [B, T]."""
        kept = self.ids.shape[1] - self.first + 1
        logits = self.model(input_ids=self.ids, attention_mask=self.seen, logits_to_keep=kept).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, self.ids[:, self.first :, None])[:, :, 0]

    def step(self) -> dict[str, float]:
        """Seconds and peaks by phase."""
        phases = Phases(self.device)
        with phases("old"), torch.no_grad():
            old = self.logp()
        with phases("policy"):
            ratio = (self.logp() - old).exp()
            term = torch.minimum(ratio * self.advantage, ratio.clamp(0.8, 1.28) * self.advantage)
            loss = -((term * self.mask).sum(1) / self.mask.sum(1)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return phases.metrics()


def ours(batch: Batch, sizes: Sizes, device: str, config: LoopConfig) -> Callable[[], dict[str, Any]]:
    policy = HuggingFaceModel(language_model(sizes, device), batch)
    config = replace(
        config, prompts=sizes.prompts, samples=sizes.samples, policy_rate=RATE, reward_rate=RATE, max_norm=1.0
    )
    return Loop(policy, lambda: batch, batch.questions, batch.verify, config=config, device=device).advance


def measured(method: str, sizes: Sizes, device: str, threads: int) -> dict[str, Any]:
    """Seconds and CPU seconds of a step, by phase too, and the peak; in a process of its own."""
    torch.set_num_threads(threads)
    batch = Batch(sizes)
    language_model(replace(sizes, vocabulary=64, width=8), device)  # what transformers loads once is not the step's
    gc.collect()
    before = resident_bytes()
    if method.startswith(PLAIN):
        step: Callable[[], dict[str, Any]] = PlainGRPO(batch, sizes, device, answers_only="answers" in method).step
    else:
        configs = {"GRPO": LoopConfig.grpo(), DISTRL: LoopConfig.distrl_ipvrm()}
        step = ours(batch, sizes, device, configs[method])
    step()
    rows = []
    for _ in range(sizes.steps):
        started, cpu = time.perf_counter(), time.process_time()
        row = step()
        rows.append(row | {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu})
    names = ["seconds", "cpu_seconds", *(name for name in rows[0] if name.startswith("seconds/"))]
    report: dict[str, Any] = {"method": method} | {name: statistics.median(row[name] for row in rows) for name in names}
    peaks = {name: max(row[name] for row in rows) for name in rows[0] if name.startswith("peak_mb/")}
    offset = 0.0 if device == "cuda" else (before or 0) / 1e6
    report |= {name: value - offset for name, value in peaks.items()}
    report["peak_mb"] = max(peaks.values()) - offset if peaks else None
    report["tokens"] = sum(len(answer) for answers in batch.answers.values() for answer in answers)
    return report


def merged(rounds: Sequence[Sequence[dict[str, Any]]], title: str) -> list[dict[str, Any]]:
    """A row per method from those of every round, whose first is the plain one's."""
    rows = []
    for mine in zip(*rounds, strict=True):
        ratios = [row["seconds"] / found[0]["seconds"] for row, found in zip(mine, rounds, strict=True)]
        numbers = {key: [row[key] for row in mine] for key, value in mine[0].items() if isinstance(value, float)}
        row: dict[str, Any] = {
            "method": mine[0]["method"],
            "batch": title,
            "tokens": mine[0]["tokens"],
            "peak_mb": None,
        }
        row |= {key: max(of) if key.startswith("peak_mb") else statistics.median(of) for key, of in numbers.items()}
        row |= {"time_ratio": statistics.median(ratios), "time_ratio_range": [min(ratios), max(ratios)]}
        rows.append(row)
    for row in rows:
        row["memory_ratio"] = None if row["peak_mb"] is None else row["peak_mb"] / rows[0]["peak_mb"]
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for title in dict.fromkeys(row["batch"] for row in rows):
        table = Table(title=f"one step, {title}: seconds and MB at the peak")
        for name in ("method", "seconds", "CPU s", *PHASES, "peak MB", "time / plain", "memory / plain"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in (row for row in rows if row["batch"] == title):
            low, high = row["time_ratio_range"]
            split = [
                f"{row[f'seconds/{phase}']:.2f}"
                + (f" · {row[peak]:.0f}" if (peak := f"peak_mb/{phase}") in row else "")
                if f"seconds/{phase}" in row
                else ""
                for phase in PHASES
            ]
            memory = ["", ""] if row["peak_mb"] is None else [f"{row['peak_mb']:.0f}", f"{row['memory_ratio']:.2f}"]
            table.add_row(
                row["method"],
                f"{row['seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                *split,
                memory[0],
                f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]",
                memory[1],
            )
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=Sizes.vocabulary)
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of a method in a round, beside a warm-up step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args(arguments)
    machine, load = describe(("prmfast", "torch", "transformers")), os.getloadavg()[0]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with progress(parsed.rounds * len(BATCHES) * len(METHODS), "methods") as bar:
        for title, (shortest, longest) in BATCHES.items():
            sizes = Sizes(parsed.vocabulary, shortest=shortest, longest=longest, steps=parsed.steps)
            rounds = []
            for _ in range(parsed.rounds):
                found = []
                for method in METHODS:
                    with ProcessPoolExecutor(1, spawn) as pool:
                        found.append(pool.submit(measured, method, sizes, parsed.device, parsed.threads).result())
                    bar.advance()
                rounds.append(found)
            rows += merged(rounds, title)
    console = wide_console()
    show(rows, console)
    if parsed.output is not None:
        report = {"machine": machine, "device": parsed.device, "threads": parsed.threads, "load": load}
        report |= {"vocabulary": parsed.vocabulary, "rounds": parsed.rounds, "rows": rows}
        write_json(parsed.output, report)
        console.print(f"written: {parsed.output}", highlight=False)


if __name__ == "__main__":
    main()
