"""Settings of a training in a YAML file, and the run that they describe."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prmfast._files import write_json

_RECORD = "training.json"


class TrainSettings(BaseModel):
    """What every training has; names are those of `transformers.TrainingArguments` where it has one.

    model: folder or hub id · train, eval: files for `read_examples` · data_schema: of both, None looks at the columns ·
    skip_bad_rows: rows that do not fit their schema are left out instead of being an error
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    train: Path
    eval: Path | None = None
    data_schema: str | None = None
    skip_bad_rows: bool = False
    output_dir: Path
    seed: int = Field(default=0, ge=0)
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: str = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    disable_dropout: bool = True
    use_cpu: bool = False
    deepspeed: Path | None = None
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)

    _own: ClassVar[frozenset[str]] = frozenset({"model", "train", "eval", "data_schema", "skip_bad_rows", "deepspeed"})

    def arguments(self, *, quiet: bool) -> dict[str, Any]:
        """Keyword arguments of the config of the trainer."""
        given = self.model_dump(exclude=set(self._own))
        board = any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))
        return given | {
            "output_dir": str(self.output_dir),
            "save_strategy": "steps",
            "eval_strategy": "no" if self.eval is None else "steps",
            "eval_steps": self.save_steps,
            "report_to": ["tensorboard"] if board else [],
            "disable_tqdm": quiet,
            "deepspeed": None if self.deepspeed is None else str(self.deepspeed),
        }

    def data(self) -> list[Any]:
        """Examples of ``train`` and, or None, of ``eval``."""
        from prmfast.prm.data import read_examples

        errors: Literal["skip", "raise"] = "skip" if self.skip_bad_rows else "raise"
        return [
            None if path is None else list(read_examples(path, schema=self.data_schema, errors=errors))
            for path in (self.train, self.eval)
        ]

    def trainer(self, *, quiet: bool) -> Any:
        """The trainer of these settings."""
        raise NotImplementedError


class PRMSettings(TrainSettings):
    """``prmfast train prm``: see `PRMConfig`. Without step_separator the template is PQM's, and no prompt is cut."""

    learning_rate: float = Field(default=1e-5, gt=0)
    loss: Literal["pqm", "bce", "mse", "orm"] = "pqm"
    variant: Literal["pqm", "theorem", "printed", "first_wrong"] = "pqm"
    zeta: float = 4.0
    normalization: Literal["paper", "released"] = "paper"
    max_length: int | None = Field(default=1024, ge=1)
    max_prompt_length: int | None = Field(default=None, ge=1)
    max_completion_length: int | None = Field(default=None, ge=1)
    step_separator: str | None = Field(default=None, min_length=1)
    train_on_last_step_only: bool = False
    dataset_num_proc: int | None = Field(default=None, ge=1)

    def trainer(self, *, quiet: bool) -> Any:
        """A `PRMTrainer`."""
        from prmfast.prm.train import PRMConfig, PRMTrainer

        return PRMTrainer(self.model, PRMConfig(**self.arguments(quiet=quiet)), *self.data())


class QuantileSettings(TrainSettings):
    """``prmfast train quantile``: see `QuantileConfig`. adapter: name of the PRM, where its config does not say."""

    learning_rate: float = Field(default=1e-4, gt=0)
    adapter: str | None = None
    levels: list[float] = [0.1, 0.5, 0.9]
    lora_r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora_layers: list[int] | None = None
    max_length: int | None = Field(default=4096, ge=1)

    _own: ClassVar[frozenset[str]] = TrainSettings._own | {"adapter"}

    def trainer(self, *, quiet: bool) -> Any:
        """A `QuantileTrainer`."""
        from prmfast.prm import AutoPRM
        from prmfast.prm.train import QuantileConfig, QuantileTrainer

        args = QuantileConfig(**self.arguments(quiet=quiet))
        base = AutoPRM.from_pretrained(self.model, adapter=self.adapter)
        return QuantileTrainer(base, args, *self.data(), base=self.model)


class IPVRMSettings(TrainSettings):
    """``prmfast train ipvrm``: see `ImplicitConfig`. reference: folder or hub id; None is ``model``."""

    learning_rate: float = Field(default=1e-6, gt=0)
    reference: str | None = None
    loss: Literal["ipvrm", "implicit_prm", "dpo_rm", "q_rm"] = "ipvrm"
    weighting: Literal["uniform", "early", "late"] = "uniform"
    reduction: Literal["sequence", "token"] = "sequence"
    beta: float | None = Field(default=None, gt=0)
    margin: float | None = None
    max_length: int = Field(default=4096, ge=1)

    _own: ClassVar[frozenset[str]] = TrainSettings._own | {"reference"}

    def trainer(self, *, quiet: bool) -> Any:
        """An `ImplicitTrainer`."""
        from prmfast.prm.train import ImplicitConfig, ImplicitTrainer

        args = ImplicitConfig(**self.arguments(quiet=quiet))
        return ImplicitTrainer(self.model, args, *self.data(), reference=self.reference)


KINDS: dict[str, type[TrainSettings]] = {"prm": PRMSettings, "quantile": QuantileSettings, "ipvrm": IPVRMSettings}


def read_settings(path: Path, kind: type[TrainSettings]) -> TrainSettings:
    """The settings in a YAML file; ValueError that names the file, the key and the rule."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(found).__name__}")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = f"; known keys: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{path}: {key}: {first['msg']}, got {first['input']!r:.80}{known}") from error


def run_training(settings: TrainSettings, *, quiet: bool = False) -> Any:
    """Trains, or goes on from the last whole checkpoint in ``output_dir``, and saves the model there; the trainer.

    ValueError where ``output_dir`` holds a run with other settings, ImportError without the extra ``train``.
    """
    needed = ["transformers", "accelerate", *(["peft"] if isinstance(settings, QuantileSettings) else [])]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f'training needs {" and ".join(absent)}: pip install "prmfast[train]"')
    from transformers import set_seed

    record = settings.output_dir / _RECORD
    wanted = json.loads(settings.model_dump_json())
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else wanted
    different = sorted(key for key in wanted.keys() | before.keys() if wanted.get(key) != before.get(key))
    if different:
        key = different[0]
        raise ValueError(
            f"output_dir {settings.output_dir} holds a run with {key}={before.get(key)!r}, not {wanted.get(key)!r}; "
            "another run needs another folder"
        )
    set_seed(settings.seed)
    trainer = settings.trainer(quiet=quiet)
    if trainer.is_world_process_zero():
        write_json(record, wanted)
    trainer.resume()
    trainer.save_model()
    return trainer
