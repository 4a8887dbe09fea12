"""The helpers that everything else leans on: atomic files, the progress bar, and what the tests of ops judge by."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from prmfast._files import atomic_path, write_json, write_text
from prmfast._progress import Bar, progress
from prmfast.ops import ias_budget, picnn_map
from prmfast.testing import assert_within_budget, make_inputs, make_picnn, poison
from tests.ops.device import answered

FILL = torch.utils.deterministic


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_appears_whole_and_its_folder_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # one file system, or the rename would not be atomic
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, old: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of it")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if old is None else [("file.txt", old)])


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="disk full"):
                write_text(path, "new")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "old")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_text(tmp_path / "file.txt", "α")
        (tmp_path / "ordinary.txt").write_text("")
        assert os.umask(mask) == mask  # asking for it must not change it
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == mode
    assert (tmp_path / "ordinary.txt").stat().st_mode & 0o777 == mode
    assert (tmp_path / "file.txt").read_bytes() == "α".encode()


def test_json_that_any_reader_takes(tmp_path: Path) -> None:
    value = {"a": [1, math.nan, (math.inf, -0.5)], "b": {"c": -math.inf, "d": None, "e": True}, "β": "NaN"}
    write_json(tmp_path / "new" / "value.json", value)
    text = (tmp_path / "new" / "value.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": [1, None, [None, -0.5]], "b": {"c": None, "d": None, "e": True}, "β": "NaN"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "new" / "other.json", {"x": object()})
    assert os.listdir(tmp_path / "new") == ["value.json"]


def test_a_disabled_bar_does_nothing() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), progress(10, "fit", enabled=False) as bar:
        assert isinstance(bar, Bar)
        bar.advance()
        bar.advance(3)
        bar.update(loss=0.5, name="x")
    assert (out.getvalue(), err.getvalue()) == ("", "")


def test_an_enabled_bar_writes_to_standard_error_alone() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), progress(4, "fitting", enabled=True) as bar:
        bar.advance(3)
        bar.update(loss=0.123456, method="qr")
        bar.advance()
    shown = " ".join(err.getvalue().split())
    assert out.getvalue() == ""
    for part in ("fitting", "4/4", "loss 0.1235", "method qr"):
        assert part in shown


def test_a_bar_lets_errors_through() -> None:
    with redirect_stderr(io.StringIO()), pytest.raises(ZeroDivisionError), progress(2, "fit") as bar:
        bar.advance(1 / 0)


def test_the_budget_passes_what_plain_torch_would_also_get_wrong() -> None:
    truth = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(4, 3)
    rough = truth.float() * 1.01
    assert_within_budget(truth.float(), truth=truth)
    assert_within_budget(rough, truth=truth, same_dtype=rough)
    assert_within_budget(torch.empty(0, 3), truth=torch.empty(0, 3, dtype=torch.float64))
    assert_within_budget(torch.tensor(1.0), truth=torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("value", "allowed"), [(2.0 + 1e-3, 2e-5), (math.nan, 2e-5), (math.inf, 2e-5)], ids=["off", "nan", "inf"]
)
def test_the_budget_names_the_row_that_breaks_it(value: float, allowed: float) -> None:
    truth = torch.full((5, 3), 2.0, dtype=torch.float64)
    fast = truth.clone()
    fast[3, 1] = value
    with pytest.raises(AssertionError, match=rf"row 3: error .* exceeds the budget {allowed:.3e}"):
        assert_within_budget(fast, truth=truth)
    other = truth.clone()
    other[2] += 1  # what plain torch gets wrong elsewhere is no excuse
    with pytest.raises(AssertionError, match="row 3"):
        assert_within_budget(fast, truth=truth, same_dtype=other)


def test_the_budget_wants_the_same_shape() -> None:
    with pytest.raises(AssertionError, match=r"fast must have shape \(2, 3\), got \(3, 2\)"):
        assert_within_budget(torch.zeros(3, 2), truth=torch.zeros(2, 3))


def test_poison_fills_unwritten_memory_and_is_taken_back() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), FILL.fill_uninitialized_memory)
    with poison():
        assert bool(torch.empty(64).isnan().all())
        assert bool(torch.empty_like(torch.zeros(3, 5, dtype=torch.float64)).isnan().all())
        assert torch.zeros(4).tolist() == [0.0] * 4
    assert (torch.are_deterministic_algorithms_enabled(), FILL.fill_uninitialized_memory) == before
    with pytest.raises(RuntimeError, match="inside"), poison():
        raise RuntimeError("inside")
    assert (torch.are_deterministic_algorithms_enabled(), FILL.fill_uninitialized_memory) == before


@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu"}, {"curvature": True}], ids=str)
def test_make_picnn_is_convex(options: dict[str, object]) -> None:
    params = make_picnn(5, (7, 6), seed=3, **options)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    value, slope = picnn_map(params, context, x)
    assert value.shape == slope.shape == (20, 61)
    bent = value[:, 2:] - 2 * value[:, 1:-1] + value[:, :-2]
    assert float(bent.min()) > -1e-9
    assert float(slope.diff(dim=1).min()) > -1e-9
    assert float(bent.max()) > 1e-4  # not a straight line
    again, other = make_picnn(5, (7, 6), seed=3, **options), make_picnn(5, (7, 6), seed=4, **options)
    assert torch.equal(picnn_map(again, context, x)[0], value)
    assert not torch.equal(picnn_map(other, context, x)[0], value)
    assert make_picnn(5, (7,), dtype=torch.float32).wz[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 13)], ids=str)
def test_make_inputs_fits_every_room(shape: tuple[int, int]) -> None:
    value, gradient = picnn_map(**make_inputs("picnn", *shape, seed=2))  # type: ignore[arg-type]
    assert value.shape == gradient.shape == shape
    given = make_inputs("ias", *shape, dtype=torch.float32, seed=2)
    assert ias_budget(**given).shape == shape[:1]  # type: ignore[arg-type]
    again = make_inputs("ias", *shape, dtype=torch.float32, seed=2)
    assert torch.equal(again["quantiles"], given["quantiles"])  # type: ignore[arg-type]


def test_make_inputs_covers_the_edges_and_names_an_unknown_room() -> None:
    quantiles = make_inputs("ias", 50, 40)["quantiles"]
    assert isinstance(quantiles, torch.Tensor)
    assert bool((quantiles < 0).any() & (quantiles > 1).any() & (quantiles == 0).any() & (quantiles == 1).any())
    with pytest.raises(ValueError, match="room must be 'picnn', 'ias', 'candidate_td' or 'dist_ppo', got 'pool'"):
        make_inputs("pool", 1, 1)


def test_a_call_that_a_backend_does_not_take_is_answered_by_another() -> None:
    def op(x: int, *, backend: str) -> tuple[int, str]:
        if x < 0:
            raise ValueError("op: x must be >= 0")
        if backend == "cuda" and x > 9:
            raise ValueError("backend='cuda' of op does not take this call: it needs x <= 9, got 10; usable: reference")
        return x, backend

    assert answered(op, 1, backend="cuda") == (1, "cuda")
    assert answered(op, 10, backend="cuda") == (10, "auto")
    with pytest.raises(ValueError, match="x must be"):
        answered(op, -1, backend="cuda")
