"""The README is a promise: its code runs as it stands, and its tables are those of the results."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.readme import RESULTS, TABLES, filled

README = Path(__file__).resolve().parents[2] / "README.md"


def test_tables_are_made_from_the_results() -> None:
    text = README.read_text()
    shown = set(re.findall(r"<!-- begin (\w+) -->\n", text))
    assert shown == {name for name in TABLES if (RESULTS / f"{name}.json").exists()}
    assert filled(text) == text, "run python -m benchmarks.readme"


@pytest.mark.slow
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    on_vllm = [block for block in blocks if "prmfast.vllm" in block]  # large models on a GPU: its imports only
    assert (len(blocks), len(on_vllm)) == (5, 1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        tree = ast.parse(block)
        if block in on_vllm:
            tree.body = [line for line in tree.body if isinstance(line, ast.ImportFrom)]
        exec(compile(tree, str(README), "exec"), names)
    assert {path.name for path in (tmp_path / "my-calibrator").iterdir()} == {"config.json", "model.safetensors"}
    assert "first estimate" in capsys.readouterr().out
