"""vLLM's asynchronous engine: what a server runs on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prmfast.engines._vllm_requests import Requests, engine_defaults, vllm_class
from prmfast.engines._vllm_streams import last_output
from prmfast.engines.base import Completion, EngineStats

_NAME = "AsyncVLLMEngine"


class AsyncVLLMEngine:
    """Implements ``AsyncEngine`` with ``vllm.v1.engine.async_llm.AsyncLLM``; samples as `VLLMEngine` draws them.

    Cancelling `draw` aborts the request inside the engine, and returns once it is gone from there. vLLM runs the model
    in a process of its own: a script that makes this engine needs ``if __name__ == "__main__"``.

    llm: an ``AsyncLLM`` of a model that generates; others may use it too
    max_new_tokens, temperature, stop, sampling, policy_id: as in `VLLMEngine`
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
        if not isinstance(llm, vllm_class("vllm.v1.engine.async_llm", "AsyncLLM", _NAME)):
            raise TypeError(f"llm must be a vllm AsyncLLM, got {type(llm).__name__}")
        self.llm = llm
        self._requests = Requests(
            llm.vllm_config,
            llm.get_tokenizer(),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
        )
        self.policy_id = policy_id or str(llm.model_config.model)
        self.temperature, self.max_new_tokens, self.stop = temperature, max_new_tokens, tuple(stop)
        self._running: set[str] = set()

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
    ) -> AsyncVLLMEngine:
        """Starts an ``AsyncLLM`` of a directory or a name with vLLM's own options; `shutdown` ends it."""
        arguments = vllm_class("vllm", "AsyncEngineArgs", _NAME)
        llm = vllm_class("vllm.v1.engine.async_llm", "AsyncLLM", _NAME).from_engine_args(
            arguments(model=str(model), **engine_defaults(engine))
        )
        return cls(
            llm,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            sampling=sampling,
            policy_id=policy_id,
        )

    async def draw(self, prompt: str, seed: int, *, prefix: str = "") -> Completion:
        """One more sample; see ``AsyncEngine.draw`` and, for errors, `VLLMEngine.sample`."""
        request = self._requests.make(prompt, seed, prefix)
        request_id = f"prmfast-{uuid.uuid4().hex}"
        ids = {"prompt_token_ids": request.prompt_ids + request.prefix_ids}
        outputs = self.llm.generate(ids, self._requests.params(seed), request_id)
        self._running.add(request_id)

        def gone(output: Any) -> None:
            self._running.discard(request_id)
            self._requests.given_up(0 if output is None else len(output.outputs[0].token_ids))

        try:
            output = await last_output(outputs, lambda: self.llm.abort(request_id), gone)
        except asyncio.CancelledError:
            raise  # `gone` is called when it is, which a second cancellation does not wait for
        except BaseException:
            self._running.discard(request_id)
            raise
        self._running.discard(request_id)
        return self._requests.completion(request, output)

    async def stats(self) -> EngineStats:
        """Tokens and requests of this object; ``cached_tokens`` are those of finished requests."""
        return self._requests.stats(len(self._running))

    def shutdown(self) -> None:
        """Ends the engine's process."""
        self.llm.shutdown()
