"""Fills the README's tables from benchmarks/results: ``python -m benchmarks.readme`` (``--check`` only compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.calibration_synthetic import Cell, reference_rows
from benchmarks.distrl_cost import PHASES as COST_PHASES
from benchmarks.distrl_tiny_report import tables as distrl_tables
from benchmarks.prm_real import cell as over_questions_and_seeds
from benchmarks.seeds import interval as over_seeds
from benchmarks.seeds import mean_interval
from prmfast._files import write_text
from prmfast.bench import table as kernel_table
from prmfast.bench.case import DERIVED, FLOOR, NATURAL

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def interval(value: list[float], digits: int = 3) -> str:
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def signed(value: list[float]) -> str:
    return f"{value[0]:+.4f} [{value[1]:+.3f}, {value[2]:+.3f}]"


def machine(result: dict[str, Any]) -> str:
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commits = {cell["commit"] for cell in result.get("cells", []) if "commit" in cell} or {about["commit"]}
    return f"{about['cpu']}, one thread, {versions}, commit {', '.join(sorted(commits))}"


def calibration_real(result: dict[str, Any]) -> str:
    rows = []
    for name, values in result["methods"].items():
        if any(variant in name for variant in ("+ bins", "sorted")):
            continue  # variants of rows that are shown; in the JSON
        plain = [f"{values[c][0]:.3f}" for c in ("pos_brier", "ece", "wql", "area")]
        paired = [signed(values[c]) if values.get(c) else "" for c in ("brier - isotonic", "brier - logistic")]
        rows.append([name, interval(values["brier"]), *plain, *paired])
    data = result["data"]
    return f"{data['rows']} prefixes, {data['questions']} questions; {machine(result)}.\n\n" + markdown(
        ["method", "Brier", "PosBrier", "ECE", "WQL", "area", "Brier minus isotonic", "Brier minus logistic"], rows
    )


def calibration_synthetic(result: dict[str, Any]) -> str:
    cells = [Cell(**cell) for cell in result["cells"]]
    seeds = len({c.seed for c in cells})
    columns = ("w1_p", "w1_share", "mean_n", "success", "miss")
    rows: list[list[str]] = []
    for count in sorted({c.rows for c in cells}):
        for rollouts in sorted({c.rollouts for c in cells if c.rows == count}):
            some = [c for c in cells if (c.rows, c.rollouts) == (count, rollouts)]
            known = reference_rows(rollouts)["true law of p"]
            rows.append([f"{count:,} x {rollouts}", "true law of p", *(f"{known[c]:.3g}" for c in columns)])
            for method in dict.fromkeys(c.method for c in some):
                mine = [c for c in some if c.method == method]
                if len(mine) < seeds:
                    continue  # a run that was cut off
                shown = [mean_interval([getattr(c, name) for c in mine]) for name in columns]
                rows.append(["", method, *(f"{m:.3g} ± {h:.1g}" for m, h in shown)])
    return f"{seeds} seeds, mean ± 95 %; {machine(result)}.\n\n" + markdown(
        ["rows x rollouts", "method", "W1 to p", "W1 to k/n", "mean N", "success", "miss"], rows
    )


def replay_real(result: dict[str, Any]) -> str:
    targets = {row["target"] for row in result["frontier"] if row["target"] is not None}
    chosen = min(targets, key=lambda target: abs(target - 0.9))
    rows = [
        [
            row["method"],
            "" if row["target"] is None else f"{row['target']:.3f}",
            f"{row['asked']:.1f}",
            f"{row['spent']:.1f}",
            interval([row["success"], row["success_low"], row["success_high"]]),
            f"{row['pool_limited']:.0%}",
            "" if row["open_success"] is None else f"{row['open_success']:.3f}",
        ]
        for row in result["frontier"]
        if row["target"] in (None, chosen)
    ]
    size = result["size"]
    about = f"{size['questions']} questions, {size['pairs']} question-policy pairs, {size['stored']} stored samples"
    return f"{about}; {machine(result)}.\n\n" + markdown(
        ["method", "target", "budget", "spent", "success", "pool too small", "success where the pool allows it"], rows
    )


def kernels_cpu(result: dict[str, Any]) -> str:
    """The rows of the acceptance table; then calls on one tiny row, and threads, where they were measured."""
    done = [row for row in result["rows"] if row["status"] == "ok" and row["threads"] == 1]
    rows = []
    for row in done:
        if row["table"]:
            beside = kernel_table.against(row, DERIVED)
            if not beside[0]:
                beside = kernel_table.against(row, FLOOR)
            ours = kernel_table.milliseconds(row["seconds"]["median"])
            cells = [*kernel_table.against(row, NATURAL), ": ".join(part for part in beside if part)]
            about = [kernel_table.title(row), row["size"], row["dtype"], ours]
            rows.append([*about, *cells, kernel_table.share(row), kernel_table.megabytes(row)])
    header = ["op", "size", "dtype", "ours, ms", "best rival, ms", "ratio", "beside it", "ceiling", "extra MB"]
    parts = [f"{kernel_machine(result)}.", "", markdown(header, rows)]
    calls = [
        f"`{kernel_table.title(row)}` {row['seconds']['median'] * 1e6:.1f}"
        for row in done
        if row["size"].startswith("call")
    ]
    if calls:
        parts += ["", f"One call on one tiny row, in us: {', '.join(calls)}."]
    if result["scaling"]:
        parts += ["", scaling(result["scaling"])]
    return "\n".join(parts)


def scaling(rows: list[dict[str, Any]]) -> str:
    """One thread over several, ours."""
    cells = [
        [
            *(kernel_table.title(row), row["size"], row["dtype"], str(row["threads"])),
            *(kernel_table.milliseconds(row[name]["seconds"]["median"]) for name in ("one_thread", "threads_used")),
            kernel_table.ratio(row["speedup"]),
        ]
        for row in rows
        if row["status"] == "ok"
    ]
    return markdown(["op", "size", "dtype", "threads", "one thread, ms", "threads, ms", "speedup"], cells)


def kernel_machine(result: dict[str, Any]) -> str:
    """CPU, instruction sets, threads, versions, compiler and commits of the runs that the rows point at."""
    first = result["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commits = ", ".join(sorted({str(about["commit"]) for about in result["runs"]}))
    sets = "/".join(first["instruction_sets"])
    rest = f"{versions}, {first['compiler']}, commit {commits}"
    return f"{first['cpu']} ({sets}), one thread unless said otherwise, {rest}"


def spread(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def vllm_cpu(result: dict[str, Any]) -> str:
    """One more step for siblings of a long chain, in seconds."""
    scoring, model = result["scoring"], result["model"]
    about = (
        f"{scoring['siblings']} chains of {scoring['steps']} steps, {scoring['tokens_per_chain']} tokens each, that "
        f"grow by one step; decoder of {model['layers']} layers, {model['hidden']} wide, random weights; "
        f"load {result['load']:.1f}; {machine(result)}"
    )
    ours = "ours, incremental"
    rows = [
        [name, spread(seconds), "" if name == ours else f"{spread(scoring['speedup'][name], 1)}x"]
        for name, seconds in scoring["seconds"].items()
    ]
    return f"{about}.\n\n" + markdown(["scoring", "seconds", f"over {ours}"], rows)


def beam_search_tiny(result: dict[str, Any]) -> str:
    """A row per search; mean and interval over seeds, paired with best-of-N of the same tokens."""
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        cells.setdefault((cell["method"], cell["bound"], cell["rank_by"]), []).append(cell)
    rows = []
    for (method, bound, rank_by), part in cells.items():
        accuracy, tokens, difference = ([cell[name] for cell in part] for name in ("accuracy", "tokens", "difference"))
        shown = [over_seeds(accuracy), f"{mean_interval(tokens)[0]:.0f}", over_seeds(difference, signed=True)]
        rows.append([method, bound, rank_by, *shown])
    seeds, (low, high) = len({cell["seed"] for cell in result["cells"]}), result["operations"]
    about = (
        f"{seeds} seeds x {result['questions']} questions of {low} to {high} operations, mean ± 95 %; {machine(result)}"
    )
    return f"{about}.\n\n" + markdown(
        ["search", "budgets read", "ranked by", "accuracy", "tokens", "minus best-of-N at equal tokens"], rows
    )


def labels_tiny(result: dict[str, Any]) -> str:
    """Heads trained on hard and soft labels, before and after calibration; mean and interval over seeds."""
    seeds = result["hard_and_soft"]
    rows = []
    for label in seeds[0]:
        row = [label]
        for method, name in (
            ("score", "bias"),
            ("isotonic", "bias"),
            ("CondOT", "bias"),
            ("score", "spearman"),
            ("CondOT", "spearman"),
        ):
            values = [seed[label][method][name] for seed in seeds]
            row.append(over_seeds(values, signed=True) if name == "bias" else over_seeds(values, 2))
        rows.append(row)
    header = [
        "labels",
        "bias, raw",
        "bias, isotonic",
        "bias, CondOT",
        "rank correlation, raw",
        "rank correlation, CondOT",
    ]
    found = result["searches"]
    columns = [name for name in found[0]["4"] if not name.startswith("rollouts")]
    searches = [[n, *(over_seeds([seed[n][name] for seed in found], 2) for name in columns)] for n in found[0]]
    search_header = ["rollouts of a prefix", *(name.replace("saved", "rollouts saved") for name in columns)]
    return (
        f"{len(seeds)} seeds, mean ± 95 %; {machine(result)}.\n\n{markdown(header, rows)}\n\n"
        f"First errors by bisection beside rollouts of every step; truth: 64 fresh rollouts.\n\n"
        + markdown(search_header, searches)
    )


def ranking_tiny(result: dict[str, Any]) -> str:
    """A row per loss: best of 8 by every aggregation, and how its step scores rank; mean and interval over seeds."""
    runs, n = result["runs"], "8"
    rows = []
    for loss, first in runs[0]["losses"].items():
        mine = [run["losses"][loss] for run in runs]
        row = [loss, *(over_seeds([run["bon"][how][n] for run in mine]) for how in first["bon"])]
        rows.append(row + [over_seeds([run["steps"][name] for run in mine], 2) for name in first["steps"]])
    place = [over_seeds([run["step number"][name] for run in runs], 2) for name in runs[0]["step number"]]
    rows.append(["minus the step number", *[""] * len(runs[0]["losses"]["BCE"]["bon"]), *place])
    low, high = result["operations"]
    without = [
        f"{name.replace('@n', f'@{n}')} {over_seeds([run['without'][name][n] for run in runs])}"
        for name in runs[0]["without"]
    ]
    about = f"{len(runs)} seeds x {result['sizes']['test']} questions of {low} to {high} operations, mean ± 95 %"
    header = ["loss", *(f"best of {n}, {how}" for how in runs[0]["losses"]["BCE"]["bon"])]
    header += ["rank correlation", "in an answer", "pairs in order", "in an answer"]
    return f"{about}; {', '.join(without)}; {machine(result)}.\n\n" + markdown(header, rows)


def implicit_tiny(result: dict[str, Any]) -> str:
    """A row per implicit model and baseline; mean and interval over seeds."""
    seeds = result["seeds"]
    columns = {
        "spearman, mean": "rank correlation, mean",
        "spearman, sum": "rank correlation, sum",
        "spearman within, sum": "the same within a question",
        "F1, prefix": "F1, prefix",
        "F1, process": "F1, process",
        "BON@4": "BON@4",
        "BON@16": "BON@16",
    }
    rows = [
        [name, *(over_seeds([seed[name][c] for seed in seeds], 2) if c in row else "" for c in columns)]
        for name, row in seeds[0].items()
    ]
    return f"{len(seeds)} seeds, mean ± 95 %; {machine(result)}.\n\n" + markdown(["", *columns.values()], rows)


def prm_real(result: dict[str, Any]) -> str:
    """A row per loss and baseline: first errors, pairs and best-of-n on real answers, judged out of fold."""

    def column(file: str, read: Callable[[dict[str, Any]], Any], **where: Any) -> str:
        found = [
            read(row)
            for rows in result["tables"][file]
            for row in rows
            if all(row[key] == wanted for key, wanted in where.items())
        ]
        return over_questions_and_seeds(found) if found else ""

    f1, in_order, selected = itemgetter("f1"), itemgetter("in_order"), itemgetter("value", "low", "high")
    last = result["tables"]["game24_gpt4_cot"][0][-1]["n"]
    rows = [
        [
            name,
            column("processbench", f1, loss=name, subset="all"),
            column("bigbench_mistake", f1, loss=name, subset="all"),
            column("ipvrm_qwen3_0p6b_val", in_order, loss=name, score="min"),
            column("game24_gpt4_cot", selected, method=f"best of n: {name}", n=last),
        ]
        for name in dict.fromkeys(row["loss"] for row in result["tables"]["processbench"][0])
    ]
    for title, method in (("random pick", "avg"), ("majority", "majority"), ("one right answer", "pass@n")):
        rows.append([title, "", "", "", column("game24_gpt4_cot", selected, method=method, n=last)])
    about = f"{result['folds']} folds by question, {result['seeds']} training seeds; 95 % over questions, ± over seeds"
    header = ["loss", "ProcessBench, F1", "BIG-bench Mistake, F1", "Qwen3-0.6B, pairs in order", f"24, best of {last}"]
    return f"{about}; {machine(result)}.\n\n" + markdown(header, rows)


def distrl_tiny(result: dict[str, Any]) -> str:
    """Accuracy of the methods at equal rollouts, options, label imbalance, calibration after training."""
    sizes, seeds = result["sizes"], len({cell["seed"] for cell in result["cells"]})
    step = f"{sizes['prompts']} questions x {sizes['samples']} answers a step"
    about = f"{seeds} seeds, mean ± 95 %; {step}; {machine(result)}"
    parts = [f"{about}."]
    for grid in distrl_tables(result):
        parts += [f"{grid.title[0].upper()}{grid.title[1:]}:", markdown(grid.header, grid.rows)]
    return "\n\n".join(parts)


def distrl_cost(result: dict[str, Any]) -> str:
    """Seconds and memory of a step beside the plain GRPO step's, with the split by phase."""
    rows = []
    for row in result["rows"]:
        phases = [f"{row[name]:.2f}" if (name := f"seconds/{phase}") in row else "" for phase in COST_PHASES]
        memory = ["", ""] if row["peak_mb"] is None else [f"{row['peak_mb']:.0f}", f"{row['memory_ratio']:.2f}"]
        beside = interval([row["time_ratio"], *row["time_ratio_range"]], 2)
        rows.append([row["batch"], row["method"], f"{row['seconds']:.2f}", *phases, beside, *memory])
    header = ["batch", "step", "seconds", *COST_PHASES, "time / plain", "peak MB", "memory / plain"]
    size = f"V = {result['vocabulary']:,}, {result['rounds']} rounds: median, ratios [least, largest]"
    about = f"{result['device']}, {size}; load {result['load']:.1f}; {machine(result)}"
    return f"{about}.\n\n" + markdown(header, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "kernels_cpu": kernels_cpu,
    "calibration_real": calibration_real,
    "calibration_synthetic": calibration_synthetic,
    "replay_real": replay_real,
    "vllm_cpu": vllm_cpu,
    "beam_search_tiny": beam_search_tiny,
    "labels_tiny": labels_tiny,
    "implicit_tiny": implicit_tiny,
    "ranking_tiny": ranking_tiny,
    "prm_real": prm_real,
    "distrl_tiny": distrl_tiny,
    "distrl_cost": distrl_cost,
}


def filled(text: str) -> str:
    """The README with every marked block replaced by its table."""
    for name in re.findall(r"<!-- begin (\w+) -->\n", text):
        block = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md must have one block {name!r}, got {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README differs from the results")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    new = filled(text)
    if arguments.check:
        sys.exit(0 if new == text else "README.md differs from benchmarks/results: run python -m benchmarks.readme")
    write_text(path, new)


if __name__ == "__main__":
    main()
