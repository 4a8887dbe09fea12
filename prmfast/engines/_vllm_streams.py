"""A request of vLLM's asynchronous engine from its first output to its last, or to its end inside the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

_AGAIN = 0.02  # seconds until an abort is repeated that came before vLLM had registered the request
_ENDING: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks weakly


async def last_output(
    outputs: AsyncIterator[Any], abort: Callable[[], Awaitable[None]], gone: Callable[[Any], None] = lambda _: None
) -> Any:
    """The last of ``outputs``, None without any.

    Where the call is cancelled, the request is aborted, and the call returns once it is gone from the engine; ``gone``
    is then called with its last output or None. The outputs are read by a task of its own: where a cancellation cut
    vLLM off half way, it could leave the request running.
    """
    reading = asyncio.create_task(_last(outputs))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        ending = asyncio.create_task(_end(reading, abort, gone))
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)
        await asyncio.shield(ending)
        raise


async def _last(outputs: AsyncIterator[Any]) -> Any:
    last = None
    async for output in outputs:
        last = output
    return last


async def _end(reading: asyncio.Task[Any], abort: Callable[[], Awaitable[None]], gone: Callable[[Any], None]) -> None:
    while not reading.done():
        await abort()
        await asyncio.wait({reading}, timeout=_AGAIN)
    failed = reading.cancelled() or reading.exception() is not None
    gone(None if failed else reading.result())
