"""The process behind `prmfast.pipeline.MathVerifier`: requests on standard input, verdicts on standard output."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def check(reference: str, completion: str, timeout: int) -> dict[str, Any]:
    """{"correct": ...} or, for a reference without an expression, {"error": ...}."""
    from math_verify import parse, verify

    # LaTeX is found between dollars or in a box only.
    marked = any(mark in reference for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(reference if marked else f"${reference}$", parsing_timeout=timeout)
    if not gold:
        return {"error": f"the reference answer must hold an expression that math-verify can parse, got {reference!r}"}
    found = parse(completion, parsing_timeout=timeout)
    return {"correct": bool(found) and verify(gold, found, timeout_seconds=timeout)}


def main() -> None:
    """Answers until standard input ends."""
    # What a library prints goes to standard error, not between the verdicts.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    import math_verify  # noqa: F401

    print("{}", file=answers, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(check(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
