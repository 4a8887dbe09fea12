"""Incremental scoring, the client's side: what is known of chains of steps, and what must still be asked.

vLLM's prefix cache leaves out the rows of tokens that it finds there, so the client keeps every step's row. A step is
known by all token ids up to its own row: siblings share what they have in common, and a template that changes earlier
tokens makes its steps unknown instead of wrong.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prmfast.prm.adapter import EncodedChain


@dataclass(slots=True)
class Chain:
    """A prompt, the row of each of its steps as far as it is known, and what each step is known by."""

    encoded: EncodedChain
    empty: bool
    keys: tuple[bytes, ...]
    rows: list[Tensor] = field(default_factory=list)  # of the first steps; never with a gap

    @property
    def complete(self) -> bool:
        """Whether nothing needs to be asked."""
        return len(self.rows) == len(self.keys)

    @property
    def next_key(self) -> bytes:
        """The first step that is not known; chains that share it had better not be asked at the same time."""
        return self.keys[len(self.rows)]


def make_chain(encoded: EncodedChain, *, empty: bool) -> Chain:
    """A chain of which nothing is known yet."""
    digest = hashlib.blake2b(b"empty" if empty else b"steps", digest_size=16)
    keys, start = [], 0
    for position in encoded.step_positions:
        digest.update(array("q", encoded.token_ids[start : position + 1]).tobytes() + b"|")
        keys.append(digest.digest())
        start = position + 1
    return Chain(encoded, empty, tuple(keys))


class StepStore:
    """Rows of steps by key, at most ``max_steps`` of them; those not used for longest go first."""

    def __init__(self, max_steps: int) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self.max_steps = max_steps
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forgets everything."""
        self._rows.clear()

    def fill(self, chain: Chain) -> int:
        """Extends ``chain.rows`` by the steps that are known without a gap; how many those were."""
        before = len(chain.rows)
        for key in chain.keys[before:]:
            row = self._rows.get(key)
            if row is None:
                break
            self._rows.move_to_end(key)
            chain.rows.append(row)
        return len(chain.rows) - before

    def add(self, chain: Chain, rows: Tensor) -> None:
        """Takes up what the engine said of the chain's last ``len(rows)`` steps; a row with NaN stays unknown."""
        first = len(chain.keys) - len(rows)
        usable = rows.isfinite().all(1).tolist()
        for step, (row, good) in enumerate(zip(rows, usable, strict=True), start=first):
            if not good:
                continue
            # what was said first stays: a sibling's row of the same step may differ in its last bits
            held = self._rows.setdefault(chain.keys[step], row)
            self._rows.move_to_end(chain.keys[step])
            if step == len(chain.rows):
                chain.rows.append(held)
        while len(self._rows) > self.max_steps:
            self._rows.popitem(last=False)


def next_wave(chains: Iterable[Chain]) -> list[Chain]:
    """Of the incomplete chains the longest for each first unknown step: what they share is then computed once."""
    wave: dict[bytes, Chain] = {}
    for chain in chains:
        if not chain.complete:
            held = wave.get(chain.next_key)
            if held is None or len(chain.keys) > len(held.keys):
                wave[chain.next_key] = chain
    return list(wave.values())


def missing(chains: Sequence[Chain]) -> list[Chain]:
    """The chains that an answered request has left incomplete."""
    return [chain for chain in chains if not chain.complete]
