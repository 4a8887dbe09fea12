"""The numba rivals of room ias: plain loops with early exit, compiled with fastmath."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prmfast.bench.case import Call, require


def numba_budget(quantiles: Tensor, target: float, n_max: int, *, double: bool) -> Call:
    """A row at a time, its running powers in a small array, until the row has reached the target."""
    numba = require("numba")
    import numpy as np

    kind = np.float64 if double else np.float32

    @numba.njit(fastmath=True)
    def budget(q: Any, limit: Any, n_max: int, out: Any, fail: Any, power: Any) -> None:
        rows, columns = q.shape
        for i in range(rows):
            total = limit - limit
            for m in range(columns):
                fail[m] = 1 - q[i, m]
                power[m] = fail[m]
                total += fail[m]
            n = 1
            while n < n_max and total > limit:
                total = limit - limit
                for m in range(columns):
                    power[m] *= fail[m]
                    total += power[m]
                n += 1
            out[i] = n

    array = quantiles.numpy()
    columns = array.shape[1]
    limit = kind((1 - target) * columns)

    def run() -> Tensor:
        out = np.empty(len(array), np.int32)
        budget(array, limit, n_max, out, np.empty(columns, kind), np.empty(columns, kind))
        return torch.from_numpy(out)

    return Call(run)


def numba_curve(quantiles: Tensor, n_max: int) -> Call:
    """A row at a time, its running powers in a small array."""
    numba = require("numba")
    import numpy as np

    @numba.njit(fastmath=True)
    def curve(q: Any, n_max: int, out: Any, fail: Any, power: Any) -> None:
        rows, columns = q.shape
        for i in range(rows):
            for m in range(columns):
                fail[m] = np.float32(1) - q[i, m]
                power[m] = np.float32(1)
            for n in range(n_max):
                total = np.float32(0)
                for m in range(columns):
                    power[m] *= fail[m]
                    total += power[m]
                out[i, n] = np.float32(1) - total / np.float32(columns)

    array = quantiles.numpy()
    columns = array.shape[1]

    def run() -> Tensor:
        out = np.empty((len(array), n_max), np.float32)
        curve(array, n_max, out, np.empty(columns, np.float32), np.empty(columns, np.float32))
        return torch.from_numpy(out)

    return Call(run)


def numba_allocate(quantiles: Tensor, total: int, n_max: int) -> Call:
    """A greedy with a binary heap of every row's next gain; a row's powers are advanced when it is served."""
    numba = require("numba")
    import numpy as np

    @numba.njit(fastmath=True)
    def sink(keys: Any, ids: Any, at: int) -> None:
        size = keys.shape[0]
        key, who = keys[at], ids[at]
        while True:
            child = 2 * at + 1
            if child >= size:
                break
            if child + 1 < size and keys[child + 1] > keys[child]:
                child += 1
            if keys[child] <= key:
                break
            keys[at], ids[at] = keys[child], ids[child]
            at = child
        keys[at], ids[at] = key, who

    @numba.njit(fastmath=True)
    def allocate(q: Any, total: int, n_max: int, term: Any, keys: Any, ids: Any, out: Any) -> None:
        rows, columns = q.shape
        for i in range(rows):
            gain = np.float32(0)
            for m in range(columns):
                term[i, m] = q[i, m]
                gain += q[i, m]
            keys[i], ids[i] = gain, i
        for i in range(rows // 2 - 1, -1, -1):
            sink(keys, ids, i)
        for _ in range(total):
            i = ids[0]
            out[i] += 1
            gain = np.float32(0)
            for m in range(columns):
                term[i, m] *= np.float32(1) - q[i, m]
                gain += term[i, m]
            keys[0] = gain if out[i] < n_max else np.float32(-1)
            sink(keys, ids, 0)

    array = quantiles.numpy()

    def run() -> Tensor:
        rows = len(array)
        out = np.zeros(rows, np.int32)
        spaces = np.empty_like(array), np.empty(rows, np.float32), np.empty(rows, np.int64)
        allocate(array, total, n_max, *spaces, out)
        return torch.from_numpy(out)

    return Call(run)
