"""A server that anybody can start gives the offline engine's numbers over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prmfast.vllm import VLLMPRM, prm_engine_args, prm_server_args
from tests.vllm import calibrators
from tests.vllm.conftest import ANSWER, ENGINE, QUESTION, STEPS

Checkpoint = Callable[[str], str]
PATIENCE = 240  # seconds until /health; a start takes 15 to 40 on two cores


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return calibrators.save(tmp_path_factory.mktemp("calibrator"), "features")


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, calibrator: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = prm_server_args(
        checkpoint("qwen"), calibrator=calibrator, **ENGINE, served_model_name="prm", host="127.0.0.1", port=port
    )
    log = Path(tmp_path_factory.mktemp("server")) / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
        )
    base = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + PATIENCE
        while not healthy(base):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < limit, log.read_text()[-4000:]
            time.sleep(0.5)
        yield base
    finally:
        process.terminate()
        process.wait(timeout=60)


def healthy(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def ask(base: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{base}/pooling", json={"model": "prm", **body}, timeout=60)


@pytest.fixture(scope="module")
def offline(start_llm: Callable[..., Any], checkpoint: Checkpoint, calibrator: str) -> VLLMPRM:
    return VLLMPRM(start_llm(**prm_engine_args(checkpoint("qwen"), calibrator=calibrator)), levels=[0.1, 0.5, 0.9])


def test_pooling_of_a_question_and_its_answers(server: str, offline: VLLMPRM) -> None:
    texts = [ANSWER, None, "\n\n".join(STEPS[::-1])]
    response = ask(server, task="plugin", data={"question": QUESTION, "answers": texts, "targets": [0.9]})
    assert response.status_code == 200, response.text
    said = response.json()["data"]
    assert (said["prm_id"], said["levels"]) == ("qwen-prm", [0.1, 0.5, 0.9])
    for found, rows in zip(said["answers"], offline.rows([QUESTION] * 3, texts), strict=True):
        assert rows is not None
        assert found["positions"] == rows.positions.tolist()
        for name in ("scores", "expected", "quantiles"):
            torch.testing.assert_close(torch.tensor(found[name]), getattr(rows, name), rtol=1e-5, atol=1e-5)
        assert all(1 <= budget <= 64 for (budget,) in found["budgets"])


def test_plain_pooling_of_a_prompt(server: str, offline: VLLMPRM) -> None:
    scoring = offline._scoring
    text = scoring.adapter.text(QUESTION, STEPS)
    response = ask(server, task="token_classify", input=[text])
    assert response.status_code == 200, response.text
    rows = scoring.form.split(torch.tensor(response.json()["data"][0]["data"]))
    (expected,) = offline.rows([QUESTION], [ANSWER])
    assert expected is not None
    assert rows.positions.tolist() == expected.positions.tolist()
    for name in ("scores", "expected", "quantiles"):
        torch.testing.assert_close(getattr(rows, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data", [{"question": QUESTION}, {"question": QUESTION, "answers": [ANSWER], "levels": 0}])
def test_bad_data_is_the_clients_fault(server: str, data: dict[str, Any]) -> None:
    response = ask(server, task="plugin", data=data)
    assert response.status_code == 400, response.text
    assert "data: " in response.json()["error"]["message"]
    assert healthy(server)
