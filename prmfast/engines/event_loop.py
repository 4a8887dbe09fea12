"""A streaming engine of this process on an event loop."""

from __future__ import annotations

import asyncio

from prmfast.engines.base import Completion, EngineStats, StreamingEngine


class AsyncFromStreaming:
    """Implements ``AsyncEngine`` with a ``StreamingEngine``: for scripts, notebooks and tests without a server process.

    The engine works on the event loop's own thread, one `poll` at a time with the loop's other tasks in between, so a
    call of `poll` holds the loop up for as long as it takes. It must have no other users meanwhile.
    """

    def __init__(self, engine: StreamingEngine) -> None:
        if not isinstance(engine, StreamingEngine):
            raise TypeError(f"engine must have submit(), poll(), abort() and stats(), got {type(engine).__name__}")
        self.engine = engine
        self.policy_id = engine.policy_id
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._pump: asyncio.Task[None] | None = None

    async def draw(self, prompt: str, seed: int, *, prefix: str = "") -> Completion:
        """One more sample; an error of the engine reaches every call that waits."""
        request = self.engine.submit(prompt, seed, prefix=prefix)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[request] = future
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._poll())
        try:
            return await future
        finally:
            if self._waiting.pop(request, None) is not None:  # cancelled: poll takes out what is finished
                self.engine.abort([request])

    async def stats(self) -> EngineStats:
        """The engine's."""
        return self.engine.stats()

    async def _poll(self) -> None:
        while self._waiting:
            try:
                finished = self.engine.poll()
            except Exception as error:
                for future in self._waiting.values():
                    if not future.done():
                        future.set_exception(error)
                return
            for request, completion in finished:
                future = self._waiting.pop(request)
                if not future.done():
                    future.set_result(completion)
            await asyncio.sleep(0)
