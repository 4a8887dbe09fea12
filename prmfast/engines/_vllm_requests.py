"""What the two vLLM engines share: prompts as token ids, sampling parameters, completions, counts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from prmfast._vllm import require_vllm
from prmfast.engines.base import Completion, EngineStats, check_sample_inputs

# What the engines set themselves.
_OWN = ("n", "seed", "temperature", "max_tokens", "stop", "include_stop_str_in_output", "output_kind", "detokenize")


class Request:
    """A sample on its way through vLLM."""

    __slots__ = ("prefix", "prefix_ids", "prompt", "prompt_ids", "seed")

    def __init__(self, prompt: str, seed: int, prefix: str, prompt_ids: list[int], prefix_ids: list[int]) -> None:
        self.prompt, self.seed, self.prefix = prompt, seed, prefix
        self.prompt_ids, self.prefix_ids = prompt_ids, prefix_ids


class Requests:
    """Makes requests with one model's tokenizer and one set of sampling options, and counts what becomes of them."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        *,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str],
        sampling: Mapping[str, Any] | None,
    ) -> None:
        model_config = config.model_config
        if model_config.runner_type != "generate":
            raise ValueError(
                f"llm must generate text, got runner={model_config.runner_type!r}: the policy's engine belongs here, "
                "not the PRM's"
            )
        if on_cpu() and config.scheduler_config.enable_chunked_prefill:
            raise ValueError(
                "llm must not chunk prompts: vLLM on a CPU ends with an error when it does so to a sample with a seed; "
                "start it with enable_chunked_prefill=False, as from_pretrained does"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
        taken = [name for name in _OWN if name in (sampling or {})]
        if taken:
            raise ValueError(f"sampling must not hold {', '.join(taken)}: the engine sets them")
        self.limit = int(model_config.max_model_len)
        self.max_new_tokens = max_new_tokens
        self.tokenizer = tokenizer
        self.options = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "stop": list(stop) or None,
            "include_stop_str_in_output": True,
            "output_kind": vllm_class("vllm.sampling_params", "RequestOutputKind", "SamplingParams").FINAL_ONLY,
            **(sampling or {}),
        }
        self._params = vllm_class("vllm", "SamplingParams", "SamplingParams")
        self.params(0)  # a name or a value that vLLM does not take is an error now, not at the first sample
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.finished = self.aborted = 0

    def params(self, seed: int) -> Any:
        """vLLM's sampling parameters of one sample."""
        return self._params(seed=seed, **self.options)

    def make(self, prompt: str, seed: int, prefix: str) -> Request:
        """A checked request; ValueError for an empty prompt and one that does not fit the model's length."""
        check_sample_inputs([prompt], [seed], [prefix])
        prompt_ids, prefix_ids = self._encode(prompt, special=True), self._encode(prefix, special=False)
        if not prompt_ids:
            raise ValueError("prompt must have at least one token, got none")
        if len(prompt_ids) + len(prefix_ids) + self.max_new_tokens > self.limit:
            raise ValueError(
                f"prompt, prefix and max_new_tokens must fit into max_model_len = {self.limit}, "
                f"got {len(prompt_ids)} + {len(prefix_ids)} + {self.max_new_tokens} for {prompt[:60]!r}"
            )
        self.prompt_tokens += len(prompt_ids) + len(prefix_ids)
        return Request(prompt, seed, prefix, prompt_ids, prefix_ids)

    def completion(self, request: Request, output: Any) -> Completion:
        """From a finished ``RequestOutput``; RuntimeError where vLLM gave the request up by itself."""
        drawn = output.outputs[0]
        if drawn.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended the sample of {request.prompt[:60]!r} with {drawn.finish_reason!r} ({drawn.stop_reason})"
            )
        new, cached = tuple(drawn.token_ids), int(output.num_cached_tokens or 0)
        self.finished += 1
        self.generated_tokens += len(new)
        self.cached_tokens += cached
        return Completion(
            request.prompt,
            request.seed,
            text=request.prefix + drawn.text,
            token_ids=(*request.prefix_ids, *new),
            n_tokens=len(new),
            finished=drawn.finish_reason == "stop",
            stop=drawn.stop_reason if isinstance(drawn.stop_reason, str) else None,
            cached_tokens=cached,
        )

    def given_up(self, n_tokens: int) -> None:
        """Counts an aborted request and what it had generated."""
        self.aborted += 1
        self.generated_tokens += n_tokens

    def stats(self, running: int) -> EngineStats:
        """The counts."""
        return EngineStats(
            self.prompt_tokens, self.cached_tokens, self.generated_tokens, self.finished, self.aborted, running
        )

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        key = (text, special)
        if key not in self._ids:
            if len(self._ids) >= 4096:
                self._ids.clear()
            self._ids[key] = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return self._ids[key]


def on_cpu() -> bool:
    """Whether vLLM runs on a CPU here."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def engine_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options to start an engine with: the prefix cache, and on a CPU what samples with seeds need; then ``given``."""
    needed = {"enable_chunked_prefill": False} if on_cpu() else {}
    return {"enable_prefix_caching": True, **needed, **given}


def vllm_class(module: str, name: str, what: str) -> Any:
    """A class of vLLM, after the check of its version; ``what`` needs it."""
    require_vllm(what)
    return getattr(importlib.import_module(module), name)
