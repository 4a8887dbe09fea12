"""vLLM's offline engine, in this process, one step at a time."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from prmfast.engines._vllm_requests import Request, Requests, engine_defaults, vllm_class
from prmfast.engines.base import Completion, EngineStats, check_sample_inputs

_NAME = "VLLMEngine"


class VLLMEngine:
    """Implements ``StreamingEngine`` with a ``vllm.LLM``: samples are taken up and given up while others run.

    Every sample is a request of its own, and samples of one prompt share its cached blocks. The sample with seed s + i
    is what vLLM draws as number i of a request with ``n`` samples and seed s. On a CPU in float32 it depends on
    (prompt, prefix, seed) alone; on a GPU as far as vLLM's kernels are batch-invariant (``VLLM_BATCH_INVARIANT``).

    llm: a ``vllm.LLM`` of a model that generates, on a CPU without chunked prefill (vLLM cannot rewind a CPU's random
    numbers there); it must have no other users while requests run
    max_new_tokens: length limit behind prompt and prefix · stop: strings that end an answer (kept in its text)
    sampling: further options of ``vllm.SamplingParams``, as ``{"top_p": 0.95}``
    policy_id: what the samples are said to come from; the model's name by default
    """

    def __init__(
        self,
        llm: Any,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        policy_id: str | None = None,
    ) -> None:
        if not isinstance(llm, vllm_class("vllm", "LLM", _NAME)):
            raise TypeError(f"llm must be a vllm.LLM, got {type(llm).__name__}")
        self.llm = llm
        self._engine = llm.llm_engine
        self._requests = Requests(
            self._engine.vllm_config,
            llm.get_tokenizer(),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
        )
        self.temperature, self.max_new_tokens, self.stop = temperature, max_new_tokens, tuple(stop)
        self.policy_id = policy_id or str(self._engine.model_config.model)
        self._names = itertools.count()
        self._running: dict[str, tuple[Request, str]] = {}  # by request id: request and vLLM's own id
        self._ready: list[tuple[str, Completion]] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        policy_id: str | None = None,
        **engine: Any,
    ) -> VLLMEngine:
        """Starts ``vllm.LLM(model, **engine)``: a directory or a name, and the engine's own options."""
        llm = vllm_class("vllm", "LLM", _NAME)(model=str(model), **engine_defaults(engine))
        return cls(
            llm,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            sampling=sampling,
            policy_id=policy_id,
        )

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """One answer per (prompt, seed[, prefix]); see ``Engine.sample``.

        Prompt and prefix are tokenised apart, so an answer can be continued from any text. ValueError for an empty
        prompt and where prompt, prefix and ``max_new_tokens`` exceed the model's length.
        """
        check_sample_inputs(prompts, seeds, prefixes)
        rows = zip(prompts, seeds, prefixes or [""] * len(prompts), strict=True)
        mine: list[str] = []
        done: dict[str, Completion] = {}
        try:
            for prompt, seed, prefix in rows:
                mine.append(self.submit(prompt, seed, prefix=prefix))
            wanted = set(mine)
            while len(done) < len(mine):
                for request_id, completion in self._step():
                    if request_id in wanted:
                        done[request_id] = completion
                    else:
                        self._ready.append((request_id, completion))
        except BaseException:
            self.abort(mine)
            raise
        return [done[request_id] for request_id in mine]

    def submit(self, prompt: str, seed: int, *, prefix: str = "") -> str:
        """Takes up one more sample; see ``StreamingEngine.submit`` and `sample`."""
        request = self._requests.make(prompt, seed, prefix)
        request_id = f"prmfast-{next(self._names)}"
        ids = {"prompt_token_ids": request.prompt_ids + request.prefix_ids}
        inner = self._engine.add_request(request_id, ids, self._requests.params(seed))
        self._running[request_id] = (request, inner)
        return request_id

    def poll(self) -> list[tuple[str, Completion]]:
        """One step of the engine, a token for every running sample; what has finished since the last call."""
        ready, self._ready = self._ready, []
        return ready or self._step()

    def abort(self, request_ids: Collection[str]) -> None:
        """Stops requests inside the engine and frees their cache; see ``StreamingEngine.abort``."""
        known = [request_id for request_id in request_ids if request_id in self._running]
        for request_id in known:
            _, inner = self._running.pop(request_id)
            state = self._engine.output_processor.request_states.get(inner)
            self._requests.given_up(0 if state is None else state.detokenizer.num_output_tokens())
        if known:
            self._engine.abort_request(known)
        gone = set(request_ids)
        self._ready = [row for row in self._ready if row[0] not in gone]

    def stats(self) -> EngineStats:
        """Tokens and requests so far; ``cached_tokens`` are those of finished requests."""
        return self._requests.stats(len(self._running))

    def _step(self) -> list[tuple[str, Completion]]:
        if not self._running:
            return []
        outputs = [output for output in self._engine.step() if output.finished and output.request_id in self._running]
        rows = [(output.request_id, self._running.pop(output.request_id)[0], output) for output in outputs]
        return [(request_id, self._requests.completion(request, output)) for request_id, request, output in rows]
