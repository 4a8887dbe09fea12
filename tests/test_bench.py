"""The benchmark command on its tiniest sizes: answers checked, rivals named, results kept; no timing is asserted."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prmfast.bench import ceilings, memory, picnn, table, timing
from prmfast.bench.candidate_td import eager_logsumexp, eager_logsumexp_double, from_padded, same_candidates
from prmfast.bench.candidate_td import top_candidates as padded
from prmfast.bench.case import Call, Case, Job, Rival, Unavailable, Work, assert_close
from prmfast.bench.cases import all_cases, select
from prmfast.bench.dist_ppo import closed_form, eager_closed_form, loss_by_logsumexp, terms
from prmfast.bench.ias import bit_search_budget, eager_budget, formula_budget
from prmfast.bench.inputs import logits, quantiles
from prmfast.bench.run import Results
from prmfast.bench.run_case import Options, run_case
from prmfast.bench.threads import environment
from prmfast.cli import app
from prmfast.kernels.ias import reference

ROOT = Path(__file__).resolve().parents[1]
FAST = Options(rivals=("torch eager", "numba"), fast=True)
CALLS = [case for case in all_cases() if case.size.startswith("call")]
TINY = [*select(quick=True), *CALLS]


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Every measurement collects garbage first: imported modules, which take 0.1 s a time, are left out of that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bandwidth and GEMM rates of this process are taken from a megabyte: no test reads them."""
    for name, value in (("BYTES", 2**20), ("GEMM", 64)):
        monkeypatch.setattr(ceilings, name, value)
    ceilings._block.cache_clear()
    yield
    ceilings._block.cache_clear()


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "--quiet", *map(str, arguments)])


def made_up(**changes: Any) -> Case:
    """A case whose op doubles a number, with one good rival, one that is wrong and one that is not installed."""

    def absent() -> Call:
        raise Unavailable("not installed: elsewhere")

    def make() -> Job:
        x = torch.arange(1000.0)
        rivals = {
            "good": Rival(lambda: Call(lambda: x + x)),
            "wrong": Rival(lambda: Call(lambda: x + 1)),
            "absent": Rival(absent),
            "huge": Rival(lambda: Call(lambda: x + x), extra_bytes=1e18),
        }
        parts: dict[str, Any] = {
            "ours": {"": Call(lambda: 2 * x)},
            "rivals": rivals,
            "check": lambda out: {"error": assert_close("out", out, x.double() * 2, rtol=0, atol=0)},
            "agree": lambda out, other: assert_close("other", other, out, rtol=0, atol=0) and None,
            "work": Work("none"),
        }
        return Job(**(parts | changes))

    return Case("ias", "double", "B=1", "float32", make, make, ("good", "wrong", "absent", "huge"))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_tiny_case_is_right_and_eager_gives_the_same_answer(case: Case) -> None:
    rows = run_case(case, FAST)
    assert [row["variant"] for row in rows] == list(case.variants)
    for row in rows:
        assert row["status"] == "ok", row
        assert row["errors"]
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        eager = [rival for rival in row["rivals"] if rival["name"] == "torch eager"]
        assert [rival["status"] for rival in eager] == ["ok"]
        assert {rival["status"] for rival in row["rivals"] if "numba" in rival["name"]} <= {
            "ok",
            'not installed: pip install "prmfast[bench]"',
        }


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_names_of_rivals_and_variants_are_those_of_the_job(case: Case) -> None:
    job = case.tiny()
    assert tuple(job.ours) == case.variants
    if not case.size.startswith("call"):
        assert tuple(job.rivals) == case.rivals


def test_a_profile_is_a_trace_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "ias.json"
    told = invoke("--room", "ias", "--op", "ias_budget", "--quick", "--profile", path)
    assert told.exit_code == 0, told.output
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    (case,) = select(ops=["ias_budget"], quick=True)
    assert {case.name, "prmfast::ias_budget"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_device_that_is_not_here_is_refused() -> None:
    for device, why in (("cuda", "--device cuda needs a GPU that torch"), ("tpu", "--device must be cpu or cuda")):
        told = invoke("--quick", "--device", device)
        assert told.exit_code == 1
        assert why in " ".join(told.stderr.split())


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ("--quick", "--op", "ias_budget", "--rival", "torch eager", "--output", output)
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "ias_budget" in shown.output
    written = json.loads(output.read_text())
    (row,) = written["rows"]
    about = written["runs"][row["run"]]
    assert {"cpu", "instruction_sets", "threads", "versions", "commit", "compiler", "load", "date"} <= set(about)
    assert [rival["name"] for rival in row["rivals"]] == ["torch eager", "torch eager, bit search"]
    assert row["best"] == {"natural": "torch eager", "derived": "torch eager, bit search", "floor": None}
    assert row["ceiling"]["kind"] == "read"


def test_list_names_cases_and_a_bad_selection_is_an_error() -> None:
    listed = invoke("--list", "--room", "dist_ppo")
    assert listed.exit_code == 0
    assert "dist_ppo/linear_dist_ppo_loss/float32/T=2048 d=1024 V=151936" in listed.output
    bad = invoke("--op", "no_such_op")
    assert bad.exit_code == 1
    assert "no case matches" in bad.output


def test_a_wrong_answer_of_ours_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Any) -> dict[str, float]:
        raise AssertionError("off by one")

    (row,) = run_case(made_up(check=wrong), FAST)
    assert row["status"] == "failed"
    assert "off by one" in row["error"]
    assert "seconds" not in row
    monkeypatch.setattr("prmfast.bench.run.start", lambda case, options: [row])
    assert invoke("--quick", "--op", "ias_budget").exit_code == 1


def test_a_crash_is_a_row_and_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    shown = invoke("--quick", "--op", "ias_budget", "--output", tmp_path / "results.json")
    assert shown.exit_code == 1
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["status"] == "crashed"
    assert row["error"].startswith("exit status 1")


def test_an_interrupted_run_keeps_and_shows_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run_case(made_up(), Options(rivals=("good",), fast=True))
    answers = iter([done])

    def once(case: Case, options: Options) -> list[dict[str, Any]]:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("prmfast.bench.run.start", once)
    shown = invoke("--quick", "--room", "ias", "--output", tmp_path / "results.json")
    assert shown.exit_code == 130
    assert "double" in shown.output
    assert [row["op"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["double"]


def test_rivals_that_cannot_be_compared_are_reported_and_not_timed() -> None:
    (row,) = run_case(made_up(), Options(fast=True))
    status = {rival["name"]: rival["status"] for rival in row["rivals"]}
    assert status["good"] == "ok"
    assert status["wrong"].startswith("another answer: other: 1 at (0,), expected 0")
    assert status["absent"] == "not installed: elsewhere"
    assert status["huge"].startswith("needs about")
    assert [rival["name"] for rival in row["rivals"] if "seconds" in rival] == ["good"]
    assert row["best"]["natural"] == "good"


def test_scaling_compares_one_thread_with_several() -> None:
    (row,) = run_case(made_up(), Options(threads=2, fast=True, scaling=True))
    assert row["speedup"]["median"] > 0
    assert set(row) >= {"one_thread", "threads_used"}
    torch.set_num_threads(1)


def test_a_setup_runs_before_each_call_and_is_not_timed() -> None:
    order: list[str] = []
    call = Call(lambda: order.append("run"), setup=lambda: order.append("setup"))
    timing.interleave({"a": call, "b": Call(lambda: order.append("b"))}, rounds=2, min_sample=0.0)
    assert [step for step in order if step != "b"] == ["setup", "run"] * (order.count("run"))


def test_rounds_are_interleaved_and_ratios_are_taken_within_them() -> None:
    order: list[str] = []

    def slow(name: str) -> Call:
        def run() -> None:
            order.append(name)
            torch.randn(300_000)

        return Call(run)

    samples = timing.interleave({name: slow(name) for name in "abc"}, rounds=3, min_sample=0.0)
    assert "".join(order[-9:]) == "abcabcabc"
    assert all(len(some.seconds) == 3 for some in samples.values())
    assert timing.ratios(timing.Samples([2.0, 9.0]), timing.Samples([1.0, 3.0])) == [2.0, 3.0]
    assert timing.spread([1.0, 5.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 5.0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets its high-water mark")
def test_extra_memory_is_what_lies_beyond_the_outputs() -> None:
    size = 8 * 2**20

    def call() -> torch.Tensor:
        scratch = torch.ones(4 * size)
        return scratch[:size] + 1

    out, extra = memory.extra_peak(call)
    assert extra is not None
    assert abs(extra - 16 * size) < 4 * size
    assert len(out) == size
    into = torch.zeros(4 * size)
    _, nothing = memory.extra_peak(lambda: into.add_(1), [into])
    assert nothing is not None
    assert nothing < size


def test_threads_reach_every_library() -> None:
    one = environment(1, {"XLA_FLAGS": "--keep=1 intra_op_parallelism_threads=8"})
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC")
    assert {one[name] for name in names} == {"1"}
    assert one["XLA_FLAGS"] == "--keep=1 --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    assert environment(2, {})["XLA_FLAGS"] == "intra_op_parallelism_threads=2"


def test_a_share_above_one_says_what_it_is_a_share_of() -> None:
    ceiling = {"kind": "gemm", "share": {"median": 1.5}, "avoidable": True}
    assert table.share({"ceiling": ceiling}) == "150% of gemm, direct evaluation equivalent"
    assert table.share({"ceiling": ceiling | {"avoidable": False}}) == "150% of gemm"
    direct, many = (picnn.map_job("softplus", 2, count, 8).work for count in (11, 100))
    assert (direct.avoidable, many.avoidable) == (False, True)


def test_results_replace_rows_of_the_same_case_and_forget_old_runs(tmp_path: Path) -> None:
    key = {"room": "ias", "op": "x", "dtype": "float32", "variant": "", "threads": 1}
    path = tmp_path / "r.json"
    first = Results(runs=[{"commit": "a"}])
    first.add([{**key, "size": "1", "status": "ok"}, {**key, "size": "2", "status": "ok"}], 0, scaling=False)
    first.write(path)
    second = Results.read(path)
    second.runs.append({"commit": "b"})
    second.add([{**key, "size": "2", "status": "failed"}], 1, scaling=False)
    second.write(path)
    assert [(row["size"], row["run"]) for row in Results.read(path).rows] == [("1", 0), ("2", 1)]
    third = Results.read(path)
    third.add([{**key, "size": "1", "status": "ok"}], 1, scaling=False)
    third.write(path)
    assert Results.read(path).runs == [{"commit": "b"}]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")
def test_pytest_takes_the_flag_and_writes_its_json(tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_ias.py", "-k", "call and ias_budget and ours"]
    # inside a worker of this suite pytest-benchmark would take the run for one of several processes and time nothing
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--benchmark", "--benchmark-json", str(output), "--benchmark-max-time", "0.01"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (timed,) = json.loads(output.read_text())["benchmarks"]
    assert timed["group"] == "ias/ias_budget/float32/call, B=1 M=10"
    assert timed["stats"]["rounds"] >= 5


def test_the_rivals_forms_of_a_budget_agree_with_float64() -> None:
    q = quantiles(300, 12)
    truth = reference.ias_budget(q.double(), torch.tensor(0.9, dtype=torch.float64), 64)
    for form in (eager_budget, bit_search_budget, formula_budget):
        assert int((form(q, 0.9, 64) != truth).sum()) <= 1, form.__name__


def test_the_rivals_forms_of_candidates_and_of_the_loss_agree_with_float64() -> None:
    policy, reward = logits(6, 500, torch.float32)
    truth = eager_logsumexp_double(policy, reward)
    assert len(truth.token_ids) > 3
    for form in (eager_logsumexp(policy, reward), from_padded(padded(policy, reward))):
        same_candidates(form, truth, atol=1e-5)
    flat = terms(truth._replace(policy_logp=truth.policy_logp.float(), advantage=truth.advantage.float()))
    leaf = reward.double().requires_grad_()
    loss = loss_by_logsumexp(leaf, *flat)
    (gradient,) = torch.autograd.grad(loss, leaf)
    for by_hand in (closed_form, eager_closed_form):
        out = torch.zeros_like(reward)
        assert float(by_hand(out, reward, *flat)) == pytest.approx(float(loss.detach()), abs=1e-5)
        torch.testing.assert_close(out, gradient.float(), rtol=1e-3, atol=1e-7)
