"""A PRM from its checkpoint: which adapter reads it, its backbone, its head."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from prmfast.prm.adapter import PRMAdapter, PRMError
from prmfast.prm.math_shepherd import MathShepherd
from prmfast.prm.qwen import QwenMathPRM
from prmfast.prm.reasoneval import ReasonEval
from prmfast.prm.step_separator import StepSeparatorPRM
from prmfast.prm.transformers_prm import TransformersPRM
from prmfast.prm.value_head import ValueHeadPRM

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator

SAVED_BY_TRAINERS = {"implicit_prm.json": "an implicit model", "quantile_prm.json": "a quantile PRM"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class AutoPRM:
    """Chooses the adapter from a checkpoint's config and the names of its tensors; not instantiated."""

    _adapters: ClassVar[list[PRMAdapter]] = [
        QwenMathPRM(),
        ReasonEval(),
        StepSeparatorPRM(),
        ValueHeadPRM(),
        MathShepherd(),
    ]

    def __init__(self) -> None:
        raise TypeError("AutoPRM is not instantiated; use AutoPRM.from_pretrained(directory)")

    @classmethod
    def register(cls, adapter: PRMAdapter) -> None:
        """Makes a PRM of one's own known; asked before the built-in ones. ValueError for a name that is taken."""
        if not isinstance(adapter, PRMAdapter):
            raise TypeError(f"adapter must be a PRMAdapter instance, got {adapter!r}")
        if adapter.name in cls.names():
            raise ValueError(f"adapter.name must be new, got {adapter.name!r}, which is registered")
        cls._adapters.insert(0, adapter)

    @classmethod
    def names(cls) -> list[str]:
        """Names of the registered adapters, in the order in which they are asked."""
        return [adapter.name for adapter in cls._adapters]

    @classmethod
    def adapter(
        cls, config: Any, tensors: Collection[str] = (), *, choice: str | PRMAdapter | None = None
    ) -> PRMAdapter:
        """The adapter for a model config and, where known, the checkpoint's tensor names.

        ``choice`` (a name or an adapter) overrides. PRMError where nothing matches, ValueError for an unknown name.
        """
        if isinstance(choice, PRMAdapter):
            return choice
        if choice is not None and choice not in cls.names():
            raise ValueError(f"adapter must be one of {', '.join(cls.names())}, got {choice!r}")
        for adapter in cls._adapters:
            if adapter.name == choice or (choice is None and adapter.matches(config, tensors)):
                return adapter.configured(config)
        raise PRMError(
            f"no PRM adapter matches architectures {getattr(config, 'architectures', None)} (model_type "
            f"{getattr(config, 'model_type', None)!r}); an ordinary language model is no PRM. Say what it is with "
            f"adapter=, one of {', '.join(cls.names())}, or AutoPRM.register(an adapter of your own)"
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        adapter: str | PRMAdapter | None = None,
        prm_id: str | None = None,
        calibrator: Calibrator | None = None,
        levels: int = 100,
        batch_size: int = 16,
    ) -> TransformersPRM:
        """Loads config, tokenizer, backbone and head of a released PRM; code of the checkpoint is never run.

        Args:
            directory: a folder or a hub id. revision: of the hub id.
            dtype: of the backbone; None takes the checkpoint's. The head computes in float32 (float64 with it).
            device: of both; None is the CPU.
            adapter: a name (`names`) or an adapter with options, where the config does not say or another reading is
                wanted.
            prm_id: defaults to `default_prm_id`.
            calibrator, levels, batch_size: see `TransformersPRM`.

        Raises PRMError where no adapter matches, the tokenizer does not fit, or tensors are missing.
        """
        from transformers import AutoConfig, AutoTokenizer

        name = os.fspath(directory)
        for file, kind in SAVED_BY_TRAINERS.items():
            if (Path(name) / file).is_file():
                raise PRMError(
                    f"{name} was saved as {kind}, which is no head on a decoder; prmfast.prm.load_prm reads it"
                )
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point dtype, got {dtype}")
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        tensors = Checkpoint(name, revision)
        chosen = cls.adapter(config, tensors.names, choice=adapter)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        chosen.check(config, tokenizer)  # before the backbone is read, which may take minutes
        head = chosen.head(config, tokenizer).to(torch.float64 if dtype == torch.float64 else torch.float32)
        try:
            head.load(tensors.read(head.checkpoint_names))
        except (KeyError, ValueError) as error:
            raise PRMError(f"{name}: {error.args[0]}") from error
        model = _backbone(name, config, revision, dtype).to(device or "cpu")
        return TransformersPRM(
            model,
            head,
            tokenizer,
            chosen,
            prm_id=prm_id or default_prm_id(name, revision),
            calibrator=calibrator,
            levels=levels,
            batch_size=batch_size,
        )


def default_prm_id(directory: str | os.PathLike[str], revision: str | None = None) -> str:
    """The hub id, or the name of the folder; ``@revision`` behind it where one was asked for."""
    name = os.fspath(directory)
    folder = Path(name).resolve().name if os.path.isdir(name) else name
    return folder if revision is None else f"{folder}@{revision}"


def _backbone(name: str, config: Any, revision: str | None, dtype: torch.dtype | None) -> Any:
    """The decoder without head; PRMError where its tensors are not all in the checkpoint."""
    from transformers import AutoModel
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the head's tensors are none of the backbone's: no report about them
    try:
        model, report = AutoModel.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    missing = sorted(report["missing_keys"])
    if missing:
        raise PRMError(
            f"{name} does not have {len(missing)} tensors of a {type(model).__name__} ({missing[0]}, ...): the "
            "checkpoint is damaged or is not what its config says"
        )
    return model


class Checkpoint:
    """The tensors of a checkpoint by name, read on demand: safetensors or pytorch_model.bin, in shards or one file.

    names: of all tensors
    """

    def __init__(self, directory: str, revision: str | None = None) -> None:
        self._directory, self._revision = directory, revision
        self._files: dict[str, str] = {}
        for weights in _WEIGHTS:
            index, whole = self._find(f"{weights}.index.json"), self._find(weights)
            if index is not None:
                self._files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            elif whole is not None:
                self._files = dict.fromkeys(_names(whole), weights)
            if self._files:
                break
        else:
            raise PRMError(f"{directory} has no weights: {' or '.join(_WEIGHTS)}, or either in shards with its index")
        self.names = frozenset(self._files)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of ``names`` that the checkpoint has."""
        found: dict[str, Tensor] = {}
        for file in sorted({self._files[name] for name in names if name in self._files}):
            path = self._find(file)
            if path is None:
                raise PRMError(f"{self._directory}: {file} is named by its index but is not there; download it again")
            found.update(_tensors(path, [name for name in names if self._files.get(name) == file]))
        return found

    def _find(self, file: str) -> str | None:
        from transformers.utils import cached_file

        path: str | None = cached_file(
            self._directory,
            file,
            revision=self._revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return path


def _names(path: str) -> list[str]:
    if path.endswith(".bin"):
        return list(_load_bin(path))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensors(path: str, names: Collection[str]) -> dict[str, Tensor]:
    if path.endswith(".bin"):
        whole = _load_bin(path)
        return {name: whole[name] for name in names}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _load_bin(path: str) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return loaded
