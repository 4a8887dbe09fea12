"""The command line: ``prmfast demo | label | train | calibrate | evaluate | replay | bench | env``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from prmfast.prm.train.command import train_app

if TYPE_CHECKING:
    from rich.console import Console

    from prmfast.calibration.metrics import Interval
    from prmfast.ias import FrontierRow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Set a target instead of an N: calibrated process reward models, instance-adaptive scaling.",
)

Command = TypeVar("Command", bound=Callable[..., Any])
Traces = Annotated[Path, typer.Argument(help="parquet file of traces (columns: see the README)")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
Output = Annotated[Path | None, typer.Option("--output", help="also write the table as JSON")]
IncludeTraining = Annotated[
    bool, typer.Option("--include-training", help="also judge on questions that the calibrators were fitted on")
]
PolicyId = Annotated[
    str | None, typer.Option(help="only this policy's answers; names the policy of traces without such a column")
]
_METRICS = ("brier", "pos_brier", "ece", "wql", "area", "crossing_rate", "spearman")


def user_errors(command: Command) -> Command:
    """Turns an error that the user can mend into one red line and exit status 1; anything else keeps its traceback."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        from prmfast.calibration.artifact import ArtifactError
        from prmfast.prm.adapter import PRMError

        try:
            return command(*arguments, **options)
        except (ValueError, TypeError, OSError, ImportError, ArtifactError, PRMError) as error:
            from rich.console import Console
            from rich.markup import escape

            Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return cast(Command, run)


app.add_typer(train_app(user_errors), name="train")


@app.command()
@user_errors
def calibrate(
    traces: Traces,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the study; made if absent")],
    method: Annotated[list[str] | None, typer.Option("--method", help="repeatable; all methods by default")] = None,
    unit: Annotated[
        list[str] | None, typer.Option("--unit", help="prefix or question, repeatable; by default what the traces give")
    ] = None,
    test_size: Annotated[float, typer.Option(help="share of the questions that no calibrator sees")] = 0.2,
    seed: Annotated[int, typer.Option(help="of the split and of every fit")] = 42,
    policy_id: PolicyId = None,
    prm_id: Annotated[str | None, typer.Option(help="recorded with the artifacts")] = None,
    quiet: Quiet = False,
) -> None:
    """Fit calibrators on a share of the questions of TRACES and save them; an interrupted call continues."""
    from prmfast.calibration.study import calibrate as fit
    from prmfast.traces import read_traces

    table = read_traces(traces, policy_id=policy_id)
    study = fit(
        table,
        output,
        methods=method,
        units=cast(Any, unit),
        test_size=test_size,
        seed=seed,
        policy_id=policy_id,
        prm_id=prm_id,
        progress=not quiet,
    )
    console = wide_console()
    for name, calibrators in study.calibrators.items():
        console.print(f"{name}: {len(calibrators)} calibrators in {output / name}", highlight=False)
    print_metrics(
        study.evaluate(table, policy_id=policy_id, progress=not quiet), console, note="questions not fitted on"
    )


@app.command()
@user_errors
def evaluate(
    paths: Annotated[list[str], typer.Argument(metavar="[DIRECTORY] FILE", show_default=False)],
    include_training: IncludeTraining = False,
    policy_id: PolicyId = None,
    output: Output = None,
    plots: Annotated[Path | None, typer.Option(help="folder of PNG files, of a PRM or of stored scores")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="folder that keeps a PRM's scores; the same call continues there")
    ] = None,
    threshold_file: Annotated[
        Path | None, typer.Option(help="chooses the threshold of first errors, on questions that FILE has not")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="name of the PRM, where its config does not say")] = None,
    question_column: Annotated[str | None, typer.Option(help="column of the question's text")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows of each file, spread evenly over it")] = None,
    largest_n: Annotated[int, typer.Option(min=1, help="of best-of-N")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="of halves, draws and intervals; not of a study")] = 0,
    quiet: Quiet = False,
) -> None:
    """Judge a study, a PRM or stored scores on the answers of FILE, with 95 % intervals by question.

    DIRECTORY is a folder of `prmfast calibrate` (FILE: traces; every metric of its calibrators), or a PRM: a folder
    that `prmfast train` wrote, or a released one by folder or hub id. Without DIRECTORY, FILE carries step scores in
    its column prm_step_scores.

    FILE is .parquet, .jsonl or .json. Steps with a first error (columns steps, first_error; prompt, completions,
    labels; input, label; completion, step_labels) give the F1 of the first wrong step, at a threshold from the other
    half of the questions or from --threshold-file, and of an implicit model by prefix and by process. Several
    answers to a question (completion, correct) give best-of-N by min, prod, last and mean, pass@n, avg@n, majority
    votes and votes weighted by scores.
    """
    if len(paths) > 2:
        raise ValueError(f"evaluate must be given FILE, or DIRECTORY and FILE, got {len(paths)} paths")
    from prmfast.evaluation.command import EvaluationSettings, evaluate_file, is_prm, open_prm, publish

    file = Path(paths[-1])
    if len(paths) == 2 and ((Path(paths[0]) / "study.json").exists() or not is_prm(paths[0])):
        if any(value is not None for value in (plots, scores, threshold_file, adapter, question_column, limit)):
            raise ValueError(
                "only a PRM takes --plots, --scores, --threshold-file, --adapter, --question-column, --limit"
            )
        evaluate_study(Path(paths[0]), file, include_training, policy_id, output, quiet=quiet)
        return
    if include_training:
        raise ValueError("--include-training must come with a study: nothing says what a PRM was trained on")
    prm = open_prm(paths[0], adapter, quiet=quiet) if len(paths) == 2 else None
    settings = EvaluationSettings(
        threshold_file, scores, question_column, policy_id, limit, largest_n=largest_n, seed=seed
    )
    try:
        found = evaluate_file(file, prm, settings, progress=not quiet)
    except KeyboardInterrupt:
        kept = "nothing was kept" if scores is None else f"the same command continues in {scores}"
        wide_console().print(f"interrupted; {kept}", highlight=False)
        raise typer.Exit(130) from None
    publish(found, wide_console(), file, None if prm is None else prm.prm_id, output=output, plots=plots)


def evaluate_study(
    directory: Path, file: Path, include_training: bool, policy_id: str | None, output: Path | None, *, quiet: bool
) -> None:
    """Prints and writes every metric of a study's calibrators."""
    from prmfast._files import write_json
    from prmfast.calibration.study import Study
    from prmfast.traces import read_traces

    study = Study.load(directory)
    table = read_traces(file, policy_id=policy_id)
    found = study.evaluate(table, include_training=include_training, policy_id=policy_id, progress=not quiet)
    print_metrics(found, wide_console(), note="all questions" if include_training else "questions not fitted on")
    if output is not None:
        write_json(output, found)


@app.command()
@user_errors
def replay(
    directory: Annotated[Path, typer.Argument(help="folder that `prmfast calibrate` wrote")],
    traces: Traces,
    target: Annotated[str, typer.Option(help="targets: one number, or LOW:HIGH:COUNT")] = "0.5:0.999:10",
    n_max: Annotated[int, typer.Option(help="largest budget of a question")] = 64,
    trials: Annotated[int, typer.Option(help="random orders of the stored samples")] = 100,
    exact: Annotated[bool, typer.Option("--exact", help="expectations over all orders instead of trials")] = False,
    seed: Annotated[int, typer.Option(help="of the orders and the intervals")] = 0,
    include_training: IncludeTraining = False,
    policy_id: PolicyId = None,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="write the cost-success frontier as PNG")] = None,
) -> None:
    """Spend the stored samples of TRACES as each calibrator of DIRECTORY would, beside fixed N and the oracle."""
    from prmfast._files import write_json
    from prmfast.calibration.study import Study
    from prmfast.ias import QuestionEstimates
    from prmfast.ias import replay as spend
    from prmfast.traces import read_traces

    study = Study.load(directory)
    calibrators = study.calibrators.get("question")
    if not calibrators:
        raise ValueError(
            f"{directory} has no question-level calibrators: the traces it was fitted on have one sample each"
        )
    estimates = QuestionEstimates.from_traces(read_traces(traces, policy_id=policy_id), policy_id=policy_id)
    if not include_training:
        estimates = estimates.unseen(study)
    frontier = spend(
        estimates.pool,
        estimates.budgets(calibrators),
        targets=parse_targets(target),
        n_max=n_max,
        trials=trials,
        exact=exact,
        seed=seed,
    )
    console = wide_console()
    questions = f"{len(set(estimates.pool.question))} questions, {len(estimates.pool)} question-policy pairs"
    console.print(f"{questions}, {int(estimates.pool.size.sum())} stored samples", highlight=False)
    if estimates.pilot:
        console.print("no question_score: the first scored sample of each pair speaks for it and is not in the pool")
    print_frontier(frontier.rows, console)
    if output is not None:
        write_json(output, frontier.to_table().to_pylist())
    if plot is not None:
        from prmfast.calibration import plots

        plots.save(plots.frontier(**frontier.curves()), plot)


@app.command()
@user_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the report")] = Path("demo-report"),
    train: Annotated[bool, typer.Option("--train", help="train the tiny policy and PRM first (2-3 minutes)")] = False,
    questions: Annotated[int, typer.Option(min=50, help="questions to calibrate on")] = 1000,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    quiet: Quiet = False,
) -> None:
    """Calibrate the embedded PRM, spend samples live to a target, and write an HTML report."""
    from prmfast.demo import run_demo

    run_demo(output, train=train, questions=questions, seed=seed, progress=not quiet, console=wide_console())


@app.command()
@user_errors
def label(
    questions: Annotated[
        Path | None, typer.Argument(help="parquet or jsonl: question, answer; question_id, prompt (default: tiny)")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the run; made if absent")] = Path("labels"),
    policy: Annotated[str, typer.Option(help="hub id or folder of a causal language model; tiny: embedded")] = "tiny",
    prm: Annotated[str | None, typer.Option(help="hub id or folder of a PRM whose scores and states are kept")] = None,
    samples: Annotated[int, typer.Option(help="answers of each question")] = 4,
    rollouts: Annotated[int, typer.Option(help="completions of each prefix; 0: no labels")] = 8,
    bisection: Annotated[bool, typer.Option("--bisection", help="only search the first error of each answer")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer, and of a rollout")] = 1024,
    temperature: Annotated[float, typer.Option(help="of the policy")] = 1.0,
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
    quiet: Quiet = False,
) -> None:
    """Sample answers, roll out their prefixes and write the labelled traces; an interrupted call continues."""
    from prmfast.pipeline import LabelSettings, label_questions
    from prmfast.pipeline.sources import policy_job, read_questions

    settings = LabelSettings(samples, rollouts, "bisection" if bisection else "exhaustive", seed=seed)
    table = None if questions is None else read_questions(questions)
    if policy == "tiny":
        from prmfast.tiny import TinyWorld

        if prm not in (None, "tiny"):
            raise ValueError(f"--prm must be tiny with the embedded policy, which has a PRM of its own, got {prm!r}")
        world = TinyWorld.load()
        asked: Any = world.questions(100, seed, split="calibration") if table is None else table
        labeller = world.labeller(settings, temperature=temperature)
    elif table is None:
        raise ValueError(f"QUESTIONS must be given with --policy {policy}: the embedded ones are for the tiny policy")
    else:
        asked, labeller = policy_job(
            table, policy, prm, settings, max_new_tokens=max_new_tokens, temperature=temperature
        )
    try:
        run = label_questions(asked, output, labeller, progress=not quiet)
    except KeyboardInterrupt:
        wide_console().print(f"interrupted; the same command continues in {output}", highlight=False)
        raise typer.Exit(130) from None
    lines = [f"{run.traces}: {run.answers} answers of {run.questions} questions"]
    if rollouts:
        saved = f"{run.saved:.0%} fewer than {run.exhaustive}" if bisection else "every step"
        lines.append(f"{run.rollouts} rollouts of prefixes ({saved}), {run.question_rollouts} of empty answers")
    for line in lines:
        wide_console().print(line, highlight=False, markup=False)


@app.command()
@user_errors
def bench(
    room: Annotated[
        list[str] | None, typer.Option("--room", help="picnn, ias, candidate_td, dist_ppo; repeatable")
    ] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="one op, as --list names it; repeatable")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", help="sizes that contain this text; repeatable")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="float32 or bfloat16; repeatable")] = None,
    rival: Annotated[
        list[str] | None, typer.Option("--rival", help="rivals whose name contains this text, or none; repeatable")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes and short rounds: does everything run?")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="ours on 1 thread beside --threads, no rivals")] = False,
    threads: Annotated[int, typer.Option(min=1, help="of every library")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[
        Path | None, typer.Option(help="only write a torch profiler trace of ours to this file (.json or .json.gz)")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSON, written after each case; updated")] = None,
    list_: Annotated[bool, typer.Option("--list", help="only print the cases")] = False,
    quiet: Quiet = False,
) -> None:
    """Time every op beside what else would do its job, after checking both; exit status 1 if an answer is wrong."""
    from prmfast.bench import table
    from prmfast.bench.cases import select
    from prmfast.bench.run import run
    from prmfast.bench.run_case import Options

    check_device(device)
    on = device == "cuda"
    cases = select(room or (), op or (), size or (), dtype or (), quick=quick, scaling=scaling, gpu=on)
    console = wide_console()
    if list_:
        for case in cases:
            console.print(f"{case.name}  rivals: {', '.join(case.rivals)}", highlight=False, markup=False)
        return
    kept = ("torch", "GEMMs", "Liger") if on and rival is None else rival
    options = Options(threads, None if kept is None else tuple(kept), fast=quick, scaling=scaling, device=device)
    if profile is not None:
        from prmfast.bench.profile import write_trace

        write_trace(cases, options, profile)
        console.print(f"{profile}: {len(cases)} cases", highlight=False, markup=False)
        return
    rows, interrupted = [], False
    try:
        for some in run(cases, options, output, show=not quiet):
            rows += some
    except KeyboardInterrupt:  # what is done is in the file; show it too
        interrupted = True
    console.print(table.scaling_table(rows) if scaling else table.results_table(rows))
    for line in table.absent(rows):
        console.print(line, highlight=False, markup=False)
    if interrupted:
        raise typer.Exit(130)
    if any(row["status"] in ("failed", "crashed") for row in rows):
        raise typer.Exit(1)


def check_device(device: str) -> None:
    """ValueError unless ``device`` is one that a benchmark can run on here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda needs a GPU that torch {torch.__version__} sees, found none")


@app.command()
def env() -> None:
    """Print versions, the backends that run here, and why one is missing."""
    from prmfast._env import render

    render(wide_console())


def wide_console() -> Console:
    """A console on standard output; 180 columns where that is not a terminal, so that tables stay whole in files."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=180)


def parse_targets(text: str) -> list[float]:
    """``0.9`` or ``LOW:HIGH:COUNT`` as a list of targets; ValueError for anything else."""
    parts = text.split(":")
    try:
        if len(parts) == 1:
            return [float(parts[0])]
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
    except (ValueError, IndexError) as error:
        raise ValueError(f"target must be a number or LOW:HIGH:COUNT, got {text!r}") from error
    if len(parts) != 3 or count < 1:
        raise ValueError(f"target must be a number or LOW:HIGH:COUNT with COUNT >= 1, got {text!r}")
    if count == 1:
        return [low]
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def print_metrics(found: Any, console: Console, *, note: str) -> None:
    """A table per unit: methods down, metrics across, each with its 95 % interval."""
    from rich.table import Table

    for unit, methods in found.items():
        table = Table(title=f"{unit} level, {note}; value [95 % interval by question]")
        table.add_column("method", no_wrap=True)
        for name in _METRICS:
            table.add_column(name, justify="right")
        for method, values in methods.items():
            table.add_row(method, *(interval_text(values[name]) for name in _METRICS))
        console.print(table)


def interval_text(value: Interval | None) -> str:
    """``.123 [.110, .136]``; without an interval where it has no width, ``-`` where there is no value."""
    if value is None or math.isnan(value.value):
        return "-"
    if value.low == value.high:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def print_frontier(rows: Sequence[FrontierRow], console: Console) -> None:
    """A row per method and target."""
    from rich.table import Table

    table = Table(title="replay without replacement; mean [95 % interval by question]")
    for name in (
        "method",
        "target",
        "budget",
        "spent",
        "success",
        "best-of-N",
        "pool-limited",
        "at N max",
        "success, open",
    ):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
    previous = None
    for row in rows:
        if previous is not None and row.method != previous:
            table.add_section()
        previous = row.method
        table.add_row(
            row.method,
            "" if row.target is None else f"{row.target:.3f}",
            f"{row.asked:.1f}",
            f"{row.spent.value:.1f}",
            interval_text(row.success),
            interval_text(row.best_of_n),
            f"{row.pool_limited:.0%}",
            f"{row.at_n_max:.0%}",
            interval_text(row.open_success),
        )
    console.print(table)
    console.print(
        "success: a right answer among those drawn. open: questions whose budget is below N max and the pool's size."
    )


def main() -> None:
    """The console script."""
    app(prog_name="prmfast")


if __name__ == "__main__":
    main()
