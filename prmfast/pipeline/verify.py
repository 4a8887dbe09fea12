"""Answers checked with math-verify, in a process that can be ended.

math-verify limits its own time with SIGALRM. That works in the main thread alone, takes the alarm away from whoever
set one, and waits for what a C library computes in one call. So it runs in a process of its own, started on first use:
any thread may ask, and an answer that takes far too long costs that process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

_START_SECONDS = 120.0  # for the import of sympy, on a busy machine


class MathVerifier:
    """``verify(question, completion)``: whether the answer in a completion equals the question's reference answer.

    The last boxed, or else the last stated expression of the completion is compared with the reference as math-verify
    compares them (``math_verify.parse`` and ``verify``). Safe to call from any thread, and to pickle.

    Args:
        references: question text to its right answer, LaTeX or plain ("\\frac{1}{2}", "$x^2$", "42").
        timeout: whole seconds for one parse or comparison; an answer that takes longer is wrong.

    Raises ImportError without math-verify, KeyError for an unknown question, ValueError for a reference answer that
    math-verify finds nothing in, RuntimeError for an answer that ends math-verify's process twice.
    """

    def __init__(self, references: Mapping[str, str], *, timeout: int = 5) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('MathVerifier needs math-verify: pip install "prmfast[verify]"')
        if not isinstance(references, Mapping):
            raise TypeError(f"references must map questions to answers, got {type(references).__name__}")
        for question, answer in references.items():
            if not isinstance(answer, str):
                raise TypeError(f"references[{question!r}] must be a string, got {type(answer).__name__}")
        if isinstance(timeout, bool) or not isinstance(timeout, int):
            raise TypeError(f"timeout must be a whole number of seconds, got {type(timeout).__name__}")
        if timeout < 1:
            raise ValueError(f"timeout must be at least 1 second, got {timeout}")
        self.references = dict(references)
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_make, (self.references, self.timeout))

    @property
    def verifier_id(self) -> str:
        """Names math-verify's version, the references and the timeout."""
        digest = hashlib.sha256(json.dumps(sorted(self.references.items())).encode()).hexdigest()[:12]
        return f"math-verify {importlib.metadata.version('math-verify')} references {digest} timeout {self.timeout} s"

    def __call__(self, question: str, completion: str) -> bool:
        """Whether ``completion`` ends in the right answer; a completion without one is wrong."""
        if question not in self.references:
            raise KeyError(f"references must hold every question, got none for {question!r}")
        asked = {"reference": self.references[question], "completion": completion, "timeout": self.timeout}
        with self._lock:
            for last in (False, True):  # a process may end through no fault of the answer: it gets a second one
                try:
                    told = self._worker().ask(asked, seconds=4.0 * self.timeout)
                    break
                except _WorkerDied:
                    self._process = None
                    if last:
                        raise
            if told is None:
                self._worker().end()
                self._process = None
                return False
        if "error" in told:
            raise ValueError(f"{told['error']} (question {question!r})")
        return bool(told["correct"])

    def _worker(self) -> _Process:
        # The process belongs to who started it: a fork of that one must not read its answers.
        if self._process is None or self._process.owner != os.getpid():
            self._process = _Process()
        return self._process

    def close(self) -> None:
        """Ends the process; a later call starts another."""
        with self._lock:
            if self._process is not None and self._process.owner == os.getpid():
                self._process.end()
            self._process = None


def _make(references: Mapping[str, str], timeout: int) -> MathVerifier:
    return MathVerifier(references, timeout=timeout)


class _WorkerDied(RuntimeError):
    """The process ended while it was asked."""


class _Process:
    """A worker and what it says, a JSON line each way; it ends by itself when this process does."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "prmfast.pipeline._math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        if self._line(_START_SECONDS) is None:
            self.end()
            raise RuntimeError(f"math-verify's process did not start within {_START_SECONDS:.0f} seconds")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer, or None when ``seconds`` are over."""
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is read below
            self._worker.stdin.write(json.dumps(request).encode() + b"\n")
            self._worker.stdin.flush()
        line = self._line(seconds)
        found: dict[str, Any] | None = None if line is None else json.loads(line)
        return found

    def end(self) -> None:
        """Kills the worker."""
        self._worker.kill()
        self._worker.wait()

    def _listen(self) -> None:
        assert self._worker.stdout is not None
        for line in self._worker.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _line(self, seconds: float) -> bytes | None:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            raise _WorkerDied(f"math-verify's process ended with status {self._worker.wait()}; its errors are above")
        return line
