from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")
pytest.importorskip("peft", reason="LoRA needs the extra prmfast[train]: no peft")

from transformers import AutoModelForCausalLM

from prmfast.cli import app
from prmfast.prm import AutoPRM
from prmfast.prm.train import last_checkpoint, load_quantile_prm
from tests.prm.models import save
from tests.prm.train.test_implicit import language_model
from tests.prm.train.toy import chains

STEPS = [{"prompt": e.question, "completions": list(e.steps), "labels": list(e.labels)} for e in chains(12)]
RATES = [{"question": f"Q{i}", "reasoning_prefix": "a\n\nb", "success_prob": i / 8} for i in range(8)]
OUTCOMES = [
    {
        "conversation": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "ab"[i % 2] * 4}],
        "label": i % 2,
    }
    for i in range(8)
]


def config(folder: Path, rows: list[Any], **settings: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {
        "model": str(folder / "base"),
        "train": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-3",  # as YAML reads 1e-3
        "use_cpu": True,
        "save_steps": 2,
    }
    path = folder / "x.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (defaults | settings).items()))
    return path


def train(kind: str, path: Path) -> Any:
    return CliRunner().invoke(app, ["train", kind, "--config", str(path), "--quiet"], prog_name="prmfast")


def base(folder: Path) -> None:
    model, tokenizer = language_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def logged(run: Path) -> set[str]:
    """Names of the scalars in a run's TensorBoard logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names: set[str] = set()
    for folder in {path.parent for path in run.rglob("events.out.tfevents.*")}:
        names |= set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    return names


def test_prm_trains_a_checkpoint_of_a_language_model_and_resumes(tmp_path: Path) -> None:
    base(tmp_path)
    path = config(tmp_path, STEPS, eval=str(tmp_path / "rows.jsonl"), logging_steps=1)
    done = train("prm", path)
    assert done.exit_code == 0, done.output
    assert "trained 3 steps" in done.stdout
    run = tmp_path / "run"
    assert len(AutoPRM.from_pretrained(run).score(["Q"], [["Step 1: a\nStep 2: b"]])[0][0]) == 2
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    if importlib.util.find_spec("tensorboard") is not None:
        assert logged(run) >= {"train/loss", "eval/loss"}
    weights = (run / "model.safetensors").read_bytes()
    (run / "checkpoint-3" / "trainer_state.json").unlink()  # as if killed before step 3 was saved
    assert last_checkpoint(run) == run / "checkpoint-2"
    assert train("prm", path).exit_code == 0
    assert (run / "model.safetensors").read_bytes() == weights
    other = train("prm", config(tmp_path, STEPS, zeta=2.0))
    assert other.exit_code == 1
    assert "holds a run with" in other.stderr


def test_quantile_trains_from_a_prm(tmp_path: Path) -> None:
    save("qwen", tmp_path / "base")
    done = train("quantile", config(tmp_path, RATES, levels=[0.25, 0.75], lora_r=2))
    assert done.exit_code == 0, done.output
    (found,) = load_quantile_prm(tmp_path / "run").step_quantiles(["Q"], ["a\n\nb"])
    assert found.shape == (2, 2)


def test_ipvrm_trains_a_language_model(tmp_path: Path) -> None:
    base(tmp_path)
    done = train("ipvrm", config(tmp_path, OUTCOMES, weighting="late", max_length=64))
    assert done.exit_code == 0, done.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: Extra inputs are not permitted, got 1; known keys: model, train"),
        ({"loss": "hinge"}, "loss: Input should be 'pqm', 'bce', 'mse' or 'orm', got 'hinge'"),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0, got 0"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    done = train("prm", config(tmp_path, STEPS, **settings))
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output
