"""A folder of finished chunks: one parquet part each, named by its number and its SHA-256, and a manifest.

    manifest.json                        what the run is of; when it is complete, its parts and the hash of the traces
    parts/part-00000-<16 hex digits>.parquet
    traces.parquet                       all parts in order, written last

A part is written under another name and renamed when it is whole, so the folder alone says what is done: a process
killed at any moment leaves whole parts and perhaps a file that the next run removes. A part whose bytes do not give
the hash in its name is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prmfast._files import atomic_path, write_json

FORMAT = 1
_STALE = (".manifest.json.*.part", ".traces.parquet.*.part", "parts/.part-*.part")  # as atomic_path names them
_PART = re.compile(r"part-(\d{5,})-([0-9a-f]{16})\.parquet")


class ManifestError(ValueError):
    """A folder belongs to another run, or to none of prmfast's."""


class PartStore:
    """The parts of one run. ``pins`` (JSON values) say what it is of; opening its folder with others is an error."""

    def __init__(self, directory: str | os.PathLike[str], pins: Mapping[str, Any], chunks: int) -> None:
        self.directory = Path(directory)
        self.chunks = chunks
        self.manifest: dict[str, Any] = {"prmfast_labels": FORMAT, **json.loads(json.dumps(pins)), "chunks": chunks}

    @property
    def traces(self) -> Path:
        """Where the merged table lies once the run is complete."""
        return self.directory / "traces.parquet"

    @contextlib.contextmanager
    def open(self) -> Iterator[PartStore]:
        """Holds the folder for this process: checks its manifest or writes one, removes what a killed run left.

        ManifestError for a folder of another run; BlockingIOError while another process works in it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with _held(self.directory):
            path = self.directory / "manifest.json"
            if path.exists():
                self._check(path)
            elif set(self.directory.iterdir()) - set(self.directory.glob(_STALE[0])):
                raise ManifestError(f"{self.directory} holds files but no manifest.json; give an empty directory")
            else:
                write_json(path, self.manifest)
            for stale in (found for pattern in _STALE for found in self.directory.glob(pattern)):
                stale.unlink()
            yield self

    def complete(self) -> bool:
        """Whether the merged traces are there, whole."""
        wanted = self._read(self.directory / "manifest.json").get("traces")
        return wanted is not None and self.traces.exists() and _sha256(self.traces) == wanted["sha256"]

    def done(self) -> dict[int, Path]:
        """Chunk number to part of every chunk that is done; parts that are damaged are removed."""
        found: dict[int, Path] = {}
        for path in sorted((self.directory / "parts").glob("part-*.parquet")):
            named = _PART.fullmatch(path.name)
            if named is None or _sha256(path)[:16] != named[2] or int(named[1]) >= self.chunks:
                path.unlink()
            else:
                found[int(named[1])] = path
        return found

    def write(self, chunk: int, table: pa.Table) -> Path:
        """Keeps the rows of one chunk; they are on disk when this returns."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue()
        name = f"part-{chunk:05d}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        path = self.directory / "parts" / name
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return path

    def merge(self) -> Path:
        """Writes the parts as one table, a part at a time, and completes the manifest. RuntimeError if one is missing.

        Every part is a checked trace table; the merged file is readable by ``prmfast.traces.read_traces``.
        """
        parts = self.done()
        missing = [i for i in range(self.chunks) if i not in parts]
        if missing:
            raise RuntimeError(f"{len(missing)} of {self.chunks} chunks are missing, the first is {missing[0]}")
        listed, rows = [], 0
        schema = pq.read_schema(parts[0])
        with atomic_path(self.traces) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for i in range(self.chunks):
                table = pq.read_table(parts[i])
                writer.write_table(table)
                rows += table.num_rows
                listed.append({"file": f"parts/{parts[i].name}", "rows": table.num_rows})
        whole = {"file": self.traces.name, "rows": rows, "sha256": _sha256(self.traces)}
        write_json(self.directory / "manifest.json", {**self.manifest, "parts": listed, "traces": whole})
        return self.traces

    def _check(self, path: Path) -> None:
        found = self._read(path)
        if found.get("prmfast_labels") != FORMAT:
            raise ManifestError(f"{path} is no manifest of prmfast labels in format {FORMAT}; give another directory")
        differing = list(_differences(self.manifest, found))
        if differing:
            raise ManifestError(
                f"{self.directory} belongs to another run: {'; '.join(differing)}. Give another directory, run with "
                f"what its manifest.json says, or remove the directory to start anew"
            )

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ManifestError(f"{path} is not JSON ({error}); give another directory") from error
        return found if isinstance(found, dict) else {}


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and set(value) == set(other):
            yield from _differences(value, other, f"{at}{name}.")
        elif value != other:
            yield f"{at}{name} must be {other!r}, got {value!r}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """An advisory lock on the folder, which the system drops with the process; none where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process works in {directory}; wait for it or give another one") from error
        yield
    finally:
        os.close(handle)
