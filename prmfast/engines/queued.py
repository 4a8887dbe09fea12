"""Any batch engine as a streaming one: requests wait in a queue and are drawn a batch a call."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from prmfast.engines.base import Completion, Engine, EngineStats, check_sample_inputs


class QueuedEngine:
    """Implements ``StreamingEngine`` on top of an ``Engine``; `poll` draws at most ``batch_size`` requests.

    A request that is given up in time costs nothing: none is half done between two calls. Requests given up after they
    were drawn do not exist, since a batch is drawn and handed out by one call.
    """

    def __init__(self, engine: Engine, *, batch_size: int = 64) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must have policy_id and sample(), got {type(engine).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.engine, self.batch_size = engine, batch_size
        self.policy_id = engine.policy_id
        self._queue: dict[str, tuple[str, int, str]] = {}
        self._requests = self._generated = self._finished = self._aborted = 0

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """As the engine's own."""
        done = self.engine.sample(prompts, seeds, prefixes=prefixes)
        self._count(done)
        return done

    def submit(self, prompt: str, seed: int, *, prefix: str = "") -> str:
        """Queues one more sample; see ``StreamingEngine.submit``."""
        check_sample_inputs([prompt], [seed], [prefix])
        request = str(self._requests)
        self._requests += 1
        self._queue[request] = (prompt, seed, prefix)
        return request

    def poll(self) -> list[tuple[str, Completion]]:
        """Draws the oldest requests; an error of the engine loses those of the batch."""
        requests = list(self._queue)[: self.batch_size]
        if not requests:
            return []
        prompts, seeds, prefixes = zip(*(self._queue.pop(request) for request in requests), strict=True)
        done = self.engine.sample(prompts, seeds, prefixes=prefixes if any(prefixes) else None)
        self._count(done)
        return list(zip(requests, done, strict=True))

    def abort(self, request_ids: Collection[str]) -> None:
        """Takes requests out of the queue; see ``StreamingEngine.abort``."""
        for request in request_ids:
            self._aborted += self._queue.pop(request, None) is not None

    def stats(self) -> EngineStats:
        """Requests and generated tokens so far; prompt tokens are not known here."""
        return EngineStats(
            generated_tokens=self._generated,
            finished=self._finished,
            aborted=self._aborted,
            running=len(self._queue),
        )

    def _count(self, done: Sequence[Completion]) -> None:
        self._generated += sum(completion.n_tokens for completion in done)
        self._finished += len(done)
