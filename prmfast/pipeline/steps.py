"""Where an answer is cut into steps, and which text the policy has written by the end of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

Splitter = Callable[[str], list[str]]
"""``split(completion) -> pieces`` with ``"".join(pieces) == completion``; a piece holds the separator that ends it."""


@dataclass(frozen=True, slots=True)
class SplitAfter:
    """A step ends behind every ``separator`` and the white space after it; white space alone is no step.

    Blank lines end the steps of the usual chat models; ``SplitAfter(";")`` cuts answers of the tiny world.
    """

    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if not isinstance(self.separator, str):
            raise TypeError(f"separator must be a string, got {type(self.separator).__name__}")
        if not self.separator:
            raise ValueError("separator must not be empty, got ''")

    def __call__(self, completion: str) -> list[str]:
        """The pieces of one answer; [] for an answer without text."""
        ends = [found.end() for found in re.finditer(rf"{re.escape(self.separator)}\s*", completion)]
        pieces: list[str] = []
        carried, start = "", 0
        for end in (*ends, len(completion)):
            piece = carried + completion[start:end]
            start = end
            if piece.strip():
                pieces.append(piece)
                carried = ""
            elif pieces:
                pieces[-1] += piece
            else:
                carried = piece
        return pieces


def cut(splitter: Splitter, completion: str) -> list[str]:
    """The pieces of ``completion``; ValueError where they are not the completion cut into consecutive parts."""
    pieces = splitter(completion)
    if "".join(pieces) != completion and (pieces or completion.strip()):
        raise ValueError(
            f"splitter must cut a completion into consecutive pieces, got {pieces!r} for {completion!r}: "
            'their concatenation must be the completion, as with prmfast.pipeline.SplitAfter("\\n\\n")'
        )
    return pieces


def prefixes(pieces: list[str]) -> list[str]:
    """The answer up to the end of each step."""
    return list(accumulate(pieces))
