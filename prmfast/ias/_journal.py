"""Drawn samples on disk, one JSON line each, so that a run that was cut off draws nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prmfast._files import write_text

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished answer; ``question`` is its index in the run."""

    question: int
    seed: int
    completion: str
    step_scores: tuple[float, ...]
    n_tokens: int
    finished: bool


class Journal:
    """Samples by (question, seed). With ``path=None`` they are kept in memory only.

    The file belongs to one list of questions, one policy and one PRM; opening it with others raises ValueError. Every
    `add` is on disk when it returns. A last line that was cut off by a crash is dropped.
    """

    def __init__(self, path: str | os.PathLike[str] | None, questions: Sequence[str], ids: Mapping[str, str]) -> None:
        self._path = None if path is None else Path(path)
        self._samples: dict[tuple[int, int], Sample] = {}
        digest = hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()
        header = {"prmfast_journal": FORMAT, "questions": digest, **ids}
        if self._path is None:
            return
        if self._path.exists() and self._path.stat().st_size:
            self._read(header)
        else:
            write_text(self._path, json.dumps(header) + "\n")

    def get(self, question: int, seed: int) -> Sample | None:
        """The sample drawn before, if any."""
        return self._samples.get((question, seed))

    def add(self, samples: Iterable[Sample]) -> None:
        """Keeps ``samples``; they are on disk when this returns."""
        fresh = list(samples)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in fresh))
                file.flush()
                os.fsync(file.fileno())
        self._samples.update(((sample.question, sample.seed), sample) for sample in fresh)

    def _read(self, header: dict[str, Any]) -> None:
        assert self._path is not None
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].decode("utf-8").splitlines()
        self._check_header(lines[0] if lines else "", header)
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                sample = Sample(**{**row, "step_scores": tuple(row["step_scores"])})
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(
                    f"journal {self._path} is damaged in line {number} ({error}); remove it to start anew"
                ) from error
            self._samples[sample.question, sample.seed] = sample
        if whole < len(content):
            with self._path.open("r+b") as file:
                file.truncate(whole)

    def _check_header(self, line: str, header: dict[str, Any]) -> None:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict) or "prmfast_journal" not in found:
            raise ValueError(f"journal {self._path} is not a prmfast journal; give another path")
        for name, wanted in header.items():
            if found.get(name) != wanted:
                raise ValueError(
                    f"journal {self._path} must be of {name} = {wanted!r}, got {found.get(name)!r}; give another path"
                )
