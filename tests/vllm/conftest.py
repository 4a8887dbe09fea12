"""Real vLLM engines on tiny random checkpoints made here. Run it by itself: `make test-vllm`.

vLLM changes torch's threads, seeds and signal handlers for its whole process, and reads its environment when it is
imported, so this folder is skipped where vLLM is absent and refuses to run beside the rest of the suite.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # offline engines stay in this process
    "OMP_NUM_THREADS": "1",  # with more, the libgomps of torch and vLLM fight: 35 times slower
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
HERE = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HERE else ["test_*.py"]

if HERE:
    if "vllm" in sys.modules:
        raise RuntimeError(
            "tests/vllm sets vLLM's environment before vLLM is imported: run it by itself, make test-vllm"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def pytest_report_header() -> str:
    if not HERE:
        return "vllm: not installed here, tests/vllm is left out (make test-vllm)"
    import vllm

    return f"vllm: {vllm.__version__} from {Path(vllm.__file__).parent}"


ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,  # torch.compile costs 26 s a start
    "max_model_len": 512,
    "max_num_seqs": 64,
    "block_size": 32,  # the least there is, so that short prompts have cached blocks
    "num_gpu_blocks_override": 2048,  # 64 MiB instead of the gigabyte that is the least vLLM can be told
    "seed": 0,
}
KINDS = {
    "qwen": "PrmfastQwenMathPRM",
    "reasoneval": "PrmfastReasonEval",
    "shepherd": "PrmfastMathShepherd",
    "pqm": "PrmfastPQM",
}
QUESTION = "Ada has 3 boxes of 4 pens and gives 5 pens away. How many pens are left?"
STEPS = (
    "Step 1: 3 boxes of 4 pens are 3 * 4 = 12 pens.",
    "Step 2: Ada gives 5 pens away.",
    "Step 3: 12 - 5 = 7 pens are left.",
    "Step 4: The answer is 7.",
)
ANSWER = "\n\n".join(STEPS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``checkpoint(kind)``: the folder of a tiny PRM with random weights, made once."""
    from tests.prm.models import save

    made: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in made:
            path = tmp_path_factory.mktemp("prm") / f"{kind}-prm"
            save(kind, path)
            made[kind] = str(path)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny causal language model with random weights and a byte-level tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.prm.models import CHATML, SIZES, byte_level

    path = tmp_path_factory.mktemp("policy") / "tiny-policy"
    tokenizer = byte_level(CHATML)
    torch.manual_seed(7)
    config = Qwen2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZES)
    Qwen2ForCausalLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def start_llm() -> Iterator[Callable[..., Any]]:
    """``start_llm(**arguments)``: an offline engine in this process with `ENGINE`'s defaults; ends with the module."""
    from vllm import LLM

    held: list[Any] = []

    def start(**arguments: Any) -> Any:
        held.append(LLM(**{**ENGINE, **arguments}))
        return held[-1]

    yield start
    for llm in held:
        llm.llm_engine.engine_core.shutdown()
    held.clear()
    gc.collect()


@pytest.fixture(scope="module")
def policy_llm(start_llm: Callable[..., Any], policy: str) -> Any:
    """A generating engine on `policy`, prefix caching on; samples with seeds forbid chunked prefill on a CPU."""
    return start_llm(model=policy, enable_prefix_caching=True, enable_chunked_prefill=False)


@pytest.fixture(scope="module")
def prm_llm(start_llm: Callable[..., Any], checkpoint: Callable[..., str]) -> Any:
    """The tiny Qwen2.5-Math-PRM on our pooler, no calibrator."""
    from prmfast.vllm import prm_engine_args

    return start_llm(**prm_engine_args(checkpoint("qwen")))
