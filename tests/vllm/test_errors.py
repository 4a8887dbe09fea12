"""Every mistake is told at start, or by an error of its own request: the engine goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import PoolingParams

from prmfast._vllm import SUPPORTED, check_version
from prmfast.calibration import ArtifactError
from prmfast.prm.adapter import PRMError
from prmfast.vllm import VLLMPRM, StepRequest, prm_engine_args
from prmfast.vllm.settings import PRMSettings, RowFormat
from tests.vllm import calibrators
from tests.vllm.conftest import ANSWER, QUESTION

Checkpoint = Callable[[str], str]


def test_versions_outside_the_range_are_named() -> None:
    for version in ("0.28.0", "0.32.1rc1", "0.33.0+cu130", "v0.30.0", "dev", "0.0.0.dev1"):
        check_version(version, "x")
    for version in ("0.27.1", "0.34.0", "1.0", "0.9.2"):
        with pytest.raises(RuntimeError, match=f"VLLMPRM needs vLLM {SUPPORTED}, found {version}"):
            check_version(version, "VLLMPRM")


def test_a_language_model_is_no_prm(policy: str, policy_llm: Any) -> None:
    with pytest.raises(PRMError, match="no PRM adapter matches architectures"):
        prm_engine_args(policy)
    with pytest.raises(RuntimeError, match=r"serves .*tiny-policy as Qwen2ForCausalLM.*prm_engine_args"):
        VLLMPRM(policy_llm)


def test_a_checkpoint_without_the_head_fails_at_start(policy: str, start_llm: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=r"no qwen2.5-math-prm .*needs the tensor 'score.0.weight'"):
        start_llm(**prm_engine_args(policy, adapter="qwen2.5-math-prm"))


def test_a_decoder_that_is_not_known(checkpoint: Checkpoint, tmp_path: Path, start_llm: Callable[..., Any]) -> None:
    folder = shutil.copytree(checkpoint("qwen"), tmp_path / "other-prm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(PRMError, match=r"model_type must be one of qwen2, .*got 'gpt2'"):
        prm_engine_args(folder, adapter="qwen2.5-math-prm")


def test_a_tokenizer_without_the_step_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen"), tmp_path / "prm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<extra_0>", "<extra_9>"))
    with pytest.raises(PRMError, match="must have '<extra_0>' as one token"):
        prm_engine_args(folder)


@pytest.mark.parametrize(
    ("fitted_for", "served", "message"),
    [
        ({"prm_id": "another-prm"}, {}, "fitted for prm_id 'another-prm', this is 'qwen-prm'"),
        ({"policy_id": "llama"}, {"policy_id": "qwen"}, "fitted for policy_id 'llama', this is 'qwen'"),
    ],
)
def test_a_calibrator_of_others(
    fitted_for: dict[str, str], served: dict[str, str], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = calibrators.save(tmp_path, "score", **fitted_for)
    with pytest.raises(ArtifactError, match=rf"calibrator 'default' \({folder}\): .*{message}.*; fit one"):
        prm_engine_args(checkpoint("qwen"), calibrator=folder, **served)
    prm_engine_args(checkpoint("qwen"), calibrator=folder, **fitted_for)


def test_a_calibrator_for_hidden_states_of_another_width(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = calibrators.save(tmp_path, "hidden", width=32)
    with pytest.raises(ArtifactError, match="hidden states of width 32, this PRM's have width 64"):
        prm_engine_args(checkpoint("qwen"), calibrator=folder)


def test_a_worker_refuses_such_a_calibrator_too(
    checkpoint: Checkpoint, tmp_path: Path, start_llm: Callable[..., Any]
) -> None:
    """As it does for a server that was started by hand."""
    arguments = prm_engine_args(checkpoint("qwen"))
    folder = calibrators.save(tmp_path, "score", prm_id="another-prm")
    arguments["additional_config"]["prmfast"]["calibrator"] = folder
    with pytest.raises(Exception, match="fitted for prm_id 'another-prm'"):
        start_llm(**arguments)


def test_a_name_that_was_not_configured(prm_llm: Any) -> None:
    with pytest.raises(ValueError, match=r"calibrator must be one of those configured \(none\), got 'mine'"):
        VLLMPRM(prm_llm, calibrator="mine")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"positions": [3, 2]}, "positions: .*must never fall"),
        ({"positions": [100_000]}, "positions must lie inside the prompt of"),
        ({"calibrator": "mine"}, "calibrator must be one of those configured"),
        ({"level": 3}, "level: Extra inputs are not permitted"),
        ({"targets": [0.5], "n_max": 0}, "n_max: .*greater than or equal to 1"),
    ],
)
def test_a_bad_request_is_told_and_the_engine_goes_on(prm_llm: Any, request_: dict[str, Any], message: str) -> None:
    prompt = VLLMPRM(prm_llm)._scoring.adapter.text(QUESTION, ["a step"])
    params = [PoolingParams(extra_kwargs={"prmfast": request_}), PoolingParams()]
    bad, good = prm_llm.encode([prompt, prompt], params, pooling_task="token_classify", use_tqdm=False)
    form = RowFormat.of(StepRequest(), PRMSettings(), 64)
    with pytest.raises(ValueError, match=message):
        form.split(bad.outputs.data)
    assert len(form.split(good.outputs.data).scores) == 1


def test_a_prm_without_step_token_wants_positions(checkpoint: Checkpoint, start_llm: Callable[..., Any]) -> None:
    llm = start_llm(**prm_engine_args(checkpoint("reasoneval")))
    output = llm.encode(["some text"], pooling_task="token_classify", use_tqdm=False)[0]
    with pytest.raises(ValueError, match="positions must be given"):
        RowFormat.of(StepRequest(), PRMSettings(), 64).split(output.outputs.data)
    assert len(VLLMPRM(llm).judge([QUESTION], [ANSWER])[0].scores) == 4


def test_bare_strings_and_unequal_lengths(prm_llm: Any) -> None:
    prm = VLLMPRM(prm_llm)
    with pytest.raises(TypeError, match="questions must be a sequence of strings"):
        prm.judge(QUESTION, [ANSWER])
    with pytest.raises(ValueError, match=r"answers must have one entry per question \(2\), got 1"):
        prm.judge([QUESTION] * 2, [ANSWER])
    with pytest.raises(TypeError, match=r"answers\[0\] must be a sequence of strings"):
        prm.score([QUESTION], [ANSWER])
    with pytest.raises(ValueError, match=r"must fit into the engine's max_model_len of 512 tokens, got 1\d\d\d"):
        prm.judge([QUESTION], ["a long step " * 100])
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        VLLMPRM(prm_llm, max_steps=0)


def test_the_plugin_not_loaded(checkpoint: Checkpoint) -> None:
    code = f"from prmfast.vllm import prm_engine_args; prm_engine_args({checkpoint('qwen')!r})"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_PLUGINS": "some_other"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert "vLLM did not load the plugin of prmfast" in told.stderr
    assert "VLLM_PLUGINS=some_other does not name it: add prmfast to that list, or unset it" in told.stderr
