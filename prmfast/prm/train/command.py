"""``prmfast train prm | quantile | ipvrm --config x.yaml``; the same command resumes a killed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

Command = TypeVar("Command", bound=Callable[..., Any])
Config = Annotated[Path, typer.Option("--config", help="YAML file of settings; unknown keys are errors")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


def train_app(guard: Callable[[Command], Command]) -> typer.Typer:
    """The sub-command ``train``; ``guard`` turns errors of the user into one line."""
    app = typer.Typer(no_args_is_help=True, help="Train process reward models; the same command resumes a killed run.")

    def start(kind: str, config: Path, quiet: bool) -> None:
        from prmfast.prm.train.settings import KINDS, read_settings, run_training

        settings = read_settings(config, KINDS[kind])
        trainer = run_training(settings, quiet=quiet)
        if trainer.is_world_process_zero():
            typer.echo(f"{settings.output_dir}: trained {trainer.state.global_step} steps")

    def prm(config: Config, quiet: Quiet = False) -> None:
        """Train a value-head PRM on step labels: PQM, BCE, MSE or ORM."""
        start("prm", config, quiet)

    def quantile(config: Config, quiet: Quiet = False) -> None:
        """Train LoRA and a quantile head on success rates, from a PRM."""
        start("quantile", config, quiet)

    def ipvrm(config: Config, quiet: Quiet = False) -> None:
        """Train an implicit reward model on outcomes or pairs, from a language model."""
        start("ipvrm", config, quiet)

    for command in (prm, quantile, ipvrm):
        app.command()(guard(cast(Any, command)))
    return app
