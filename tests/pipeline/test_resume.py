"""A run that is killed, interrupted, damaged or repeated gives the file of a run that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prmfast.pipeline import LabelRun, ManifestError, label_questions
from prmfast.tiny import TinyWorld
from tests.pipeline import jobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> LabelRun:
    """The job, left alone."""
    directory = tmp_path_factory.mktemp("whole")
    return jobs.run(world, directory / "run", directory / "log")


def same(directory: Path, whole: LabelRun) -> None:
    for name in ("traces.parquet", "manifest.json"):
        assert (directory / name).read_bytes() == (whole.traces.parent / name).read_bytes(), name
    assert jobs.finished(directory) == jobs.finished(whole.traces.parent)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(world: TinyWorld, whole: LabelRun, tmp_path: Path, seed: int) -> None:
    directory = tmp_path / "run"
    told = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.jobs", str(directory), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    lives: list[dict[str, Any]] = json.loads(told.stdout)
    assert lives[-1]["status"] == 0
    killed = [life for life in lives if life["status"] == signal.SIGKILL]
    assert len(killed) == len(lives) - 1 >= 2
    texts = jobs.questions(world)
    for life in lives:  # what was finished before a life is not asked for in it
        done = {int(name.split("-")[1]) for name in life["before"]}
        finished = {text for chunk in done for text in texts[chunk * jobs.CHUNK : (chunk + 1) * jobs.CHUNK]}
        assert not finished & set(life["asked"])
    assert {text for life in lives for text in life["asked"]} == set(texts)
    same(directory, whole)
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "parts", "traces.parquet"]
    same(directory.with_suffix(".whole"), whole)


def test_ctrl_c(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    job = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.jobs", str(directory)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not directory.with_suffix(".held").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode not in (0, 1), errors  # ended by the interrupt, not by an error of its own
    assert "KeyboardInterrupt" in errors
    assert not list(directory.rglob(".*.part"))
    done = len(jobs.finished(directory))
    again = jobs.run(world, directory, tmp_path / "log")
    assert again.resumed == done == 2
    same(directory, whole)


def test_a_complete_run_is_not_repeated(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    log = tmp_path / "log"
    again = jobs.run(world, whole.traces.parent, log)
    assert not log.exists()
    assert again.resumed == again.chunks == 9
    assert (again.rollouts, again.exhaustive) == (whole.rollouts, whole.exhaustive)


def test_damaged_parts_are_done_again_and_no_others(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    jobs.run(world, directory, log)
    parts = directory / "parts"
    names = jobs.finished(directory)
    content = (parts / names[1]).read_bytes()
    (parts / names[1]).write_bytes(content[:-7])  # cut short
    content = bytearray((parts / names[4]).read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    (parts / names[4]).write_bytes(content)
    (parts / names[6]).rename(parts / "part-00006-0000000000000000.parquet")
    (parts / "part-00099-0000000000000000.parquet").write_bytes(b"")
    (parts / ".part-00003-left.part").write_bytes(b"what a killed process had begun")
    (directory / "traces.parquet").unlink()
    log.write_text("")
    again = jobs.run(world, directory, log)
    assert again.resumed == 6
    asked = {text for line in log.read_text().splitlines() for text in json.loads(line)}
    texts = jobs.questions(world)
    assert asked == {text for chunk in (1, 4, 6) for text in texts[chunk * jobs.CHUNK : (chunk + 1) * jobs.CHUNK]}
    same(directory, whole)
    assert not list(directory.rglob(".*.part"))


def test_damaged_traces_are_merged_again(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    jobs.run(world, directory, log)
    (directory / "traces.parquet").write_bytes(b"PAR1")
    log.unlink()
    assert jobs.run(world, directory, log).resumed == 9
    assert not log.exists()
    same(directory, whole)


def test_parts_may_go_once_the_traces_are_there(world: TinyWorld, tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    jobs.run(world, directory, log)
    for path in (directory / "parts").iterdir():
        path.unlink()
    log.unlink()
    jobs.run(world, directory, log)
    assert not log.exists()


def test_chunks_change_no_label(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    found = label_questions(
        jobs.questions(world)[3:10], tmp_path / "run", jobs.labeller(world), chunk_size=5, progress=False
    ).table()
    wanted = whole.table().slice(3 * 2, 7 * 2)
    floats = ("prm_step_scores", "hidden_states", "question_score", "question_hidden")
    for name in wanted.column_names:
        if name not in floats:
            assert found.column(name).to_pylist() == wanted.column(name).to_pylist(), name
    for ours, other in zip(*(table.column("prm_step_scores").to_pylist() for table in (found, wanted)), strict=True):
        assert ours == pytest.approx(other, abs=1e-5)


def test_a_folder_belongs_to_one_run(world: TinyWorld, whole: LabelRun, tmp_path: Path) -> None:
    directory, texts = whole.traces.parent, jobs.questions(world)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    def refused(texts: list[str], chunk_size: int = jobs.CHUNK, **changes: Any) -> str:
        label = jobs.labeller(world, **changes)
        with pytest.raises(ManifestError, match="belongs to another run") as caught:
            label_questions(texts, directory, label, chunk_size=chunk_size, progress=False)
        message = str(caught.value)
        assert "Give another directory" in message
        return message

    assert "inputs.sha256 must be" in refused([*texts[1:], texts[0]])
    assert "inputs.questions must be 18, got 17" in refused(texts[1:])
    assert "settings.rollouts must be 4, got 5" in refused(texts, rollouts=5)
    assert "settings.search must be 'exhaustive', got 'bisection'" in refused(texts, search="bisection")
    assert "settings.seed must be 3, got 4" in refused(texts, seed=4)
    assert "chunk_size must be 2, got 3" in refused(texts, chunk_size=3)
    hot = jobs.LoudEngine(world, tmp_path / "log")
    hot.temperature = 2.0
    assert "engine.temperature must be 1.0, got 2.0" in refused(texts, engine=hot)
    hot.policy_id = "another"
    assert "policy_id must be 'prmfast/tiny-policy@13c4aeea9802', got 'another'" in refused(texts, engine=hot)
    other = jobs.labeller(world)
    object.__setattr__(other, "scorer", None)
    with pytest.raises(ManifestError, match=r"prm_id must be 'prmfast/tiny-prm@\w+', got None"):
        label_questions(texts, directory, other, chunk_size=jobs.CHUNK, progress=False)
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_folders_of_others_are_left_alone(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ManifestError, match=r"holds files but no manifest\.json"):
        jobs.run(world, tmp_path, tmp_path / "log")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for content, message in (("{}", "is no manifest"), ("{", "is not JSON"), ('{"prmfast_labels": 99}', "in format 1")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ManifestError, match=message):
            jobs.run(world, tmp_path, tmp_path / "log")


def test_two_processes_do_not_work_in_one_folder(world: TinyWorld, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    directory = tmp_path / "run"
    directory.mkdir()
    handle = os.open(directory, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="another process works in"):
        jobs.run(world, directory, tmp_path / "log")
    os.close(handle)
    assert jobs.run(world, directory, tmp_path / "log").chunks == 9


def test_the_traces_are_one_table_of_the_schema(whole: LabelRun) -> None:
    from prmfast.traces import read_traces

    table = read_traces(whole.traces)
    assert table.equals(pq.read_table(whole.traces))
    assert table.num_rows == whole.answers == 36
    assert table.schema.metadata[b"prm_id"].startswith(b"prmfast/tiny-prm@")
    data = whole.data()
    assert len(data) == sum(map(len, table.column("steps").to_pylist()))
    assert data.hidden is not None
    assert data.prm_id is not None
    assert len(whole.data("question")) == 18
