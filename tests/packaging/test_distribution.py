"""Source archive, wheel and both editable installs hold what they should and work outside the repository."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from prmfast import __version__
from prmfast.ops._backends import ROOMS
from tests.packaging.conftest import ROOT, copy_tree, make_environment, pip_install, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distribution")]

# The installed package computes, with the compiled backend, what the reference computes.
USE = """
import pathlib, sys
import torch
import prmfast
from prmfast.ops import available, picnn_map
from prmfast.testing import make_picnn

assert pathlib.Path(prmfast.__file__).is_relative_to(sys.prefix), prmfast.__file__
assert "cpu" in available("picnn") and "cpu" in available("ias")
params = make_picnn(3, (8, 8), dtype=torch.float32)
context, levels = torch.rand(4, 3), torch.linspace(0, 1, 11)
fast = picnn_map(params, context, levels, backend="cpu")
slow = picnn_map(params, context, levels, backend="reference")
torch.testing.assert_close(fast, slow)
from prmfast import _C
assert not hasattr(_C, "cuda"), "the default build must be free of CUDA"
from prmfast.tiny import __path__ as tiny
print(prmfast.__version__, sum(f.stat().st_size for f in pathlib.Path(tiny[0]).rglob("*.safetensors")))
"""

# A stand-in for csrc: an editable install is about where modules are found; the wheel's test compiles the real sources.
EMPTY_EXTENSION = '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.doc() = "empty"; }\n'


def package_files() -> set[str]:
    """Every file of the package as the tree has it, rooms through their links included."""
    found = set()
    linked = [path for path in (ROOT / "prmfast" / "kernels").iterdir() if path.is_symlink()]
    for folder in (ROOT / "prmfast", *linked):
        for path in folder.rglob("*"):
            hidden = "__pycache__" in path.parts or path.suffix in (".so", ".pyc")
            if path.is_file() and not hidden:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    extension = {name for name in names if name.startswith("prmfast/_C.")}
    metadata = {name for name in names if name.startswith(f"prmfast-{__version__}.dist-info/")}
    assert len(extension) == 1
    assert names - extension - metadata == package_files()
    assert {f"prmfast/kernels/{room}/reference.py" for room in ROOMS} <= names
    assert {"prmfast/py.typed", "prmfast/tiny/weights/policy/model.safetensors"} <= names


def test_the_source_archive_holds_everything_to_build_and_test(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    rooms = {f"{tree}/{room}/reference.py" for tree in ("kernels", "prmfast/kernels") for room in ROOMS}
    wanted = {"setup.py", "constraints.txt", "Makefile", "LICENSE", "tests/conftest.py"} | sources | rooms
    assert wanted | package_files() <= set(members)
    assert all(members[name].isfile() for name in rooms)  # real files, not links that point out of the archive
    assert not [name for name in members if name.endswith((".so", ".pyc"))]


def test_the_wheel_works_outside_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    python = make_environment(tmp_path / "environment")
    pip_install(python, wheel)
    version, weights = run(python, "-c", USE, cwd=tmp_path).split()
    assert version == __version__
    assert 0 < int(weights) < 2_000_000
    told = run(python.parent / "prmfast", "env", cwd=tmp_path, COLUMNS="160")
    assert __version__ in told
    assert "picnn" in told


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_installs_find_the_rooms(mode: str, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    for source in (tree / "csrc").rglob("*.cpp"):
        source.unlink()
    (tree / "csrc" / "bindings.cpp").write_text(EMPTY_EXTENSION)
    python = make_environment(tmp_path / "environment")
    pip_install(python, "--config-settings", f"editable_mode={mode}", "--editable", tree)
    rooms = "\n".join(f"import prmfast.kernels.{room}.reference as room; print(room.__file__)" for room in ROOMS)
    found = run(python, "-c", f"{rooms}\nfrom prmfast import _C\nassert _C.__doc__ == 'empty'", cwd=tmp_path)
    for room, line in zip(ROOMS, found.split(), strict=True):
        assert Path(line).is_relative_to(tree)
        assert Path(line).resolve() == (tree / "kernels" / room / "reference.py").resolve()
