"""The public surface: curated names that resolve, a docstring on each, and one door to the compiled extension."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import prmfast

ROOT = Path(prmfast.__file__).parent
PUBLIC = sorted(
    info.name
    for info in pkgutil.walk_packages(prmfast.__path__, "prmfast.")
    if not any(part.startswith("_") for part in info.name.split(".")[1:])
)
_NOUNS = (
    ".ops",
    ".calibration",
    ".distrl",
    ".ias",
    ".engines",
    ".prm",
    ".prm.data",
    ".prm.losses",
    ".prm.train",
    ".pipeline",
    ".evaluation",
    ".tiny",
)
CURATED = ("prmfast", *(f"prmfast{name}" for name in _NOUNS))


@pytest.mark.parametrize("name", CURATED)
def test_curated_names_are_unique_and_resolve(name: str) -> None:
    module = importlib.import_module(name)
    names = module.__all__
    assert len(names) == len(set(names))
    for public in names:
        assert not public.startswith("_") or public == "__version__"
        assert getattr(module, public) is not None


def test_the_names_that_others_build_on() -> None:
    from prmfast import calibration, distrl, engines, ias, ops, prm

    fixed = {
        ops: {"picnn_map", "ias_budget", "ias_curve", "ias_allocate", "resolve", "available"},
        calibration: {"CondOTCalibrator", "QuantileRegressionCalibrator", "CalibrationData", "metrics", "plots"},
        distrl: {"gae", "group_normalised_outcome", "distrl_advantages", "distrl_loss"},
        ias: {
            "BudgetPolicy",
            "BestOfN",
            "AsyncBestOfN",
            "BestOfNController",
            "compute_n_ias",
            "determine_k",
            "determine_m",
            "replay",
        },
        engines: {"TransformersEngine", "VLLMEngine", "AsyncVLLMEngine"},
        prm: {"AutoPRM", "losses"},
    }
    for module, names in fixed.items():
        assert names <= set(module.__all__), module.__name__


def own_members(module: object, name: str) -> list[tuple[str, object]]:
    """Public functions, classes and their public methods that ``module`` itself defines."""
    found = []
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((f"{name}.{key}", value))
        if inspect.isclass(value):
            methods = [k for k, v in vars(value).items() if not k.startswith("_") and inspect.isfunction(v)]
            found += [(f"{name}.{key}.{method}", getattr(value, method)) for method in methods]
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "vllm":
            raise
        pytest.skip("runs inside vLLM, which is not installed here")
    assert module.__doc__
    bare = []
    for path, member in own_members(module, name):
        text = inspect.getdoc(member)
        generated = inspect.isclass(member) and text is not None and text.startswith(f"{member.__name__}(")
        if not text or generated:  # a dataclass without a docstring gets its signature as one
            bare.append(path)
    assert bare == []


def test_the_docstring_check_sees_a_missing_one() -> None:
    def bare() -> None: ...

    class Holder:
        """Documented."""

        def method(self) -> None: ...

    bare.__module__ = Holder.__module__ = "somewhere"
    module = type(prmfast)("somewhere")
    vars(module).update(bare=bare, Holder=Holder)
    undocumented = [path for path, member in own_members(module, "somewhere") if not inspect.getdoc(member)]
    assert undocumented == ["somewhere.bare", "somewhere.Holder.method"]


def imports_the_extension(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name == "prmfast._C" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (
            node.module == "prmfast._C" or (node.module == "prmfast" and any(a.name == "_C" for a in node.names))
        ):
            return True
    return False


def test_one_module_alone_imports_the_extension() -> None:
    doors = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if imports_the_extension(path.read_text())}
    assert doors == {"ops/_cpu/_extension.py"}
