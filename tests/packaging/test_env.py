"""`prmfast env`: what it knows, and that it says why something is missing."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path

import pytest
import torch
from rich.console import Console

from prmfast import __version__, _env
from prmfast.ops import available
from prmfast.ops._backends import BACKENDS, ROOMS


def rendered(facts: dict | None = None) -> str:
    console = Console(width=200, file=io.StringIO())
    _env.render(console, facts)
    return console.file.getvalue()


def test_collect_is_plain_data_about_this_process() -> None:
    facts = json.loads(json.dumps(_env.collect()))
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["prmfast"] == __version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["cpu"]["torch_threads"] == torch.get_num_threads()
    assert facts["cpu"]["cores"] >= 1
    assert facts["gpu"]["usable"] == torch.cuda.is_available()


def test_every_room_and_backend_is_usable_or_has_a_reason() -> None:
    rooms = _env.collect()["rooms"]
    assert tuple(rooms) == ROOMS
    for room, reasons in rooms.items():
        assert tuple(reasons) == BACKENDS
        for backend in available(room, "cpu"):
            assert reasons[backend] is None
        assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_auto_follows_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRMFAST_BACKEND", raising=False)
    assert _env.collect()["auto"]["picnn"]["cpu"] == ("cpu" if "cpu" in available("picnn", "cpu") else "reference")
    monkeypatch.setenv("PRMFAST_BACKEND", "reference")
    assert _env.collect()["auto"]["picnn"] == {"cpu": "reference", "cuda": "reference"}
    monkeypatch.setenv("PRMFAST_BACKEND", "warp")
    facts = _env.collect()
    assert facts["auto"]["picnn"]["cpu"].startswith("raises: ")
    assert "'warp'" in facts["auto"]["picnn"]["cpu"]
    assert "warp" in rendered(facts)


def test_render_names_versions_rooms_and_reasons() -> None:
    text = rendered()
    for part in (__version__, torch.__version__, *ROOMS, *BACKENDS, "not part of this version", "auto on cuda"):
        assert part in text


def test_what_auto_tries_on_a_gpu_is_explained_in_its_order() -> None:
    facts = _env.collect()
    for tried in facts["on_gpu"].values():
        assert list(tried) == [b for b in ("cuda", "triton", "reference") if b in tried]
        assert tried["reference"] == {"refused": None, "needs": []}
    assert any("float32" in need for need in facts["on_gpu"]["candidate_td"]["cuda"]["needs"])
    facts["on_gpu"]["ias"]["triton"] = {"refused": "no triton here", "needs": ["M <= 3"]}
    text = rendered(facts)
    assert "no triton here" in text
    assert "M <= 3" in text
    assert "compute capability 8.0" in text


def test_a_missing_extension_and_missing_libraries_are_told() -> None:
    facts = _env.collect()
    facts["extension"] = {"missing": "no such file", "kernels": None, "cuda_runtime": None, "cuda_devices": None}
    facts["versions"]["vllm"] = None
    text = rendered(facts)
    assert "no such file" in text
    assert "not installed" in text


def test_a_gpu_build_names_its_runtime_and_the_devices() -> None:
    facts = _env.collect()
    facts["extension"] = {"missing": None, "kernels": "avx2", "cuda_runtime": "13.0", "cuda_devices": 2}
    facts["gpu"]["devices"] = [{"name": "NVIDIA H100 80GB HBM3", "driver": "580.65.06"}]
    text = rendered(facts)
    assert "C++ (avx2) and CUDA 13.0, 2 devices" in text
    assert "NVIDIA H100 80GB HBM3 (driver 580.65.06)" in text


@pytest.mark.parametrize(
    ("script", "devices"),
    [
        ("echo 'NVIDIA H100, 80GB, 580.65.06'", [{"name": "NVIDIA H100, 80GB", "driver": "580.65.06"}]),
        ("echo 'Failed to initialize NVML'; exit 9", []),
    ],
    ids=["a_device", "a_broken_driver"],
)
def test_the_driver_tool_is_asked(script: str, devices: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert _env.collect()["gpu"]["devices"] == devices
