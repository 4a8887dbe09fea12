"""Rows of results as text: for the terminal, and the cells that the README shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prmfast.bench.case import DERIVED, FLOOR, INSTALL, NATURAL

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def ratio(value: dict[str, float]) -> str:
    """``8.1x [7.9, 8.4]``."""
    digits = 0 if value["median"] >= 100 else (1 if value["median"] >= 10 else 2)
    return f"{value['median']:.{digits}f}x [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def against(row: Row, kind: str) -> tuple[str, str]:
    """The best rival of ``kind`` with its milliseconds, and the ratio; empty where there is none."""
    name = row["best"][kind]
    if name is None:
        return "", ""
    rival = next(rival for rival in row["rivals"] if rival["name"] == name)
    return f"{name} {milliseconds(rival['seconds']['median'])}", ratio(rival["ratio"])


def share(row: Row) -> str:
    """``79% of read``; said to be that of direct evaluation where ours does less work than that."""
    ceiling = row.get("ceiling")
    if ceiling is None:
        return ""
    share = f"{ceiling['share']['median']:.0%} of {ceiling['kind']}"
    return f"{share}, direct evaluation equivalent" if ceiling.get("avoidable") else share


def own_time(row: Row) -> str:
    """Milliseconds of ours; on a GPU those of a replayed CUDA graph beside them."""
    graph = row.get("graph")
    replayed = f" (graph {milliseconds(graph['median'])})" if isinstance(graph, dict) else ""
    return milliseconds(row["seconds"]["median"]) + replayed


def megabytes(row: Row) -> str:
    """Extra peak memory in MB."""
    extra = row.get("extra_peak_bytes")
    if extra is None:
        return "not measured"
    return "< 1" if extra < 1e6 else f"{extra / 1e6:.0f}"


def title(row: Row) -> str:
    """Op and variant."""
    return f"{row['op']} ({row['variant']})" if row["variant"] else str(row["op"])


def results_table(rows: Sequence[Row]) -> Table:
    """Ours beside the best rivals."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="median ms per call; ratio = rival / ours, median of the rounds' ratios, quartiles in brackets")
    names = ("op", "size", "dtype", "ours", "best rival", "ratio", "given our algorithm", "ratio", "floor", "ratio")
    for i, name in enumerate((*names, "ceiling", "extra MB")):
        table.add_column(name, justify="left" if i in (0, 1, 2, 4, 6, 8) else "right")
    for row in rows:
        if row["status"] != "ok":
            told = (f"[red]{escape(row['status'])}[/red]", escape(row.get("error", "")))
            table.add_row(title(row), row["size"], row["dtype"], *told)
            continue
        cells = [cell for kind in (NATURAL, DERIVED, FLOOR) for cell in against(row, kind)]
        table.add_row(
            *(title(row), row["size"], row["dtype"], own_time(row), *cells),
            *(share(row), megabytes(row)),
        )
    return table


def scaling_table(rows: Sequence[Row]) -> Table:
    """One thread beside several."""
    from rich.table import Table

    table = Table("op", "size", "dtype", "ms, 1 thread", "threads", "ms", "speedup", title="threads, ours alone")
    for row in rows:
        if row["status"] != "ok":
            table.add_row(title(row), row["size"], row["dtype"], f"[red]{row['status']}[/red]")
            continue
        times = [milliseconds(row[name]["seconds"]["median"]) for name in ("one_thread", "threads_used")]
        cells = (times[0], str(row["threads"]), times[1], ratio(row["speedup"]))
        table.add_row(title(row), row["size"], row["dtype"], *cells)
    return table


def absent(rows: Sequence[Row]) -> list[str]:
    """One line for each rival that did not run, with the reason; libraries that are missing once, with the remedy."""
    lines: dict[str, None] = {}
    for row in rows:
        for rival in row.get("rivals", ()):
            if rival["status"] == "ok":
                continue
            where = "" if INSTALL in rival["status"] else f" ({title(row)}, {row['size']}, {row['dtype']})"
            lines[f"{rival['name']}: {rival['status']}{where}"] = None
    return list(lines)
