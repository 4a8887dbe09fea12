"""Any PRM that prmfast knows, by its folder or hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prmfast.prm.auto import SAVED_BY_TRAINERS, AutoPRM
from prmfast.prm.implicit import ImplicitPRM, load_implicit_prm
from prmfast.prm.transformers_prm import TransformersPRM


def load_prm(directory: str | os.PathLike[str], **options: Any) -> TransformersPRM | ImplicitPRM:
    """A released PRM or one that a trainer saved: with a head, with quantiles, or implicit.

    options: of `AutoPRM.from_pretrained`; for an implicit model of `load_implicit_prm`, for quantiles of
    `prmfast.prm.train.load_quantile_prm`. Raises what they raise.
    """
    kinds = [kind for name, kind in SAVED_BY_TRAINERS.items() if (Path(directory) / name).is_file()]
    if "an implicit model" in kinds:
        return load_implicit_prm(directory, **options)
    if "a quantile PRM" in kinds:
        from prmfast.prm.train import load_quantile_prm

        return load_quantile_prm(directory, **options)
    return AutoPRM.from_pretrained(directory, **options)
