"""Counter-based random numbers: one per (prompt, seed, position), the same in every process, batch and engine."""

from __future__ import annotations

import hashlib

from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX = (-4658895280553007687, -7723592293110705685)  # the two SplitMix64 multipliers


def mix64(x: Tensor) -> Tensor:
    """SplitMix64 finaliser of int64 x, elementwise (arithmetic wraps modulo 2**64)."""
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Random numbers in [0, 1), float64, one per (key, counter); keys and counters int64 of one shape."""
    bits = mix64(keys + (counters + 1) * _GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def text_key(text: str) -> int:
    """Signed 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sample_keys(prompt_keys: Tensor, seeds: Tensor) -> Tensor:
    """Keys of the random streams of (prompt, seed) pairs; int64 [S] each, prompts as ``text_key``."""
    return mix64(mix64(prompt_keys) ^ mix64(seeds * _GOLDEN))
