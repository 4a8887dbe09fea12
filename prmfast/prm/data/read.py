"""Rows of parquet and JSON files as examples; an error names the file and the row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prmfast.prm.data.schemas import Example, math_shepherd, pairwise, pointwise, stepwise, success_rate

SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Example]]] = {
    "math_shepherd": (("input", "label"), math_shepherd),
    "stepwise": (("prompt", "completions", "labels"), stepwise),
    "pointwise": (("conversation", "label"), pointwise),
    "pairwise": (("chosen", "rejected"), pairwise),
    "success_rate": (("question", "reasoning_prefix", "success_prob"), success_rate),
}


class RowError(ValueError):
    """A row that does not fit its schema; ``row`` is its number, from 0."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def schema_of(columns: Iterable[str]) -> str:
    """The schema whose columns are all there; ValueError if none has, or several have, theirs."""
    present = set(columns)
    found = [name for name, (needed, _) in SCHEMAS.items() if present >= set(needed)]
    if len(found) != 1:
        known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in SCHEMAS.items())
        which = "none" if not found else " and ".join(found)
        raise ValueError(f"columns must fit one schema, {sorted(present)} fit {which}. Schemas: {known}")
    return found[0]


def parse_row(row: Mapping[str, Any], schema: str) -> Example:
    """One row as an example; ValueError that says which column is wrong and how."""
    if schema not in SCHEMAS:
        raise ValueError(f"schema must be one of {', '.join(SCHEMAS)}, got {schema!r}")
    needed, parse = SCHEMAS[schema]
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"{schema} rows must have the columns {', '.join(needed)}, got no {', '.join(missing)}")
    return parse(row)


def read_examples(
    rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    schema: str | None = None,
    errors: Literal["raise", "skip"] = "raise",
) -> Iterator[Example]:
    """The examples of ``rows``, one at a time; a path is read with `read_rows`.

    schema: a key of `SCHEMAS`; None looks at the columns of the first row. errors: "skip" leaves out rows that do not
    fit, as the released Math-Shepherd reader does with broken labels; "raise" is a `RowError` with the row's number.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
    source = "" if not isinstance(rows, (str, os.PathLike)) else f"{os.fspath(rows)}: "
    for number, row in enumerate(read_rows(rows) if isinstance(rows, (str, os.PathLike)) else rows):
        if schema is None:
            schema = schema_of(row)
        try:
            example = parse_row(row, schema)
        except (ValueError, TypeError, KeyError) as error:
            if errors == "skip":
                continue
            raise RowError(number, f"{source}row {number}: {error}") from error
        yield example


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet, .jsonl or .json file (a list of objects), without holding a parquet file in memory."""
    file = Path(path)
    if file.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _object(_parsed(line, f"{file}: row {number}"), f"{file}: row {number}")
    elif file.suffix == ".json":
        rows = _parsed(file.read_text(encoding="utf-8"), str(file))
        if not isinstance(rows, list):
            raise ValueError(f"{file} must hold a list of objects, got {type(rows).__name__}")
        for number, row in enumerate(rows):
            yield _object(row, f"{file}: row {number}")
    else:
        raise ValueError(f"path must end in .parquet, .jsonl or .json, got {os.fspath(path)!r}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    return value
