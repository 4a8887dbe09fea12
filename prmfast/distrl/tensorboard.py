"""A loop's records as TensorBoard scalars."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any


def tensorboard_logger(directory: str | os.PathLike[str]) -> Callable[[int, Mapping[str, Any]], None]:
    """``on_step`` of `Loop.run`: writes every number of a record under its own name, every reason as text.

    Raises:
        RuntimeError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError("tensorboard_logger needs the package tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(os.fspath(directory))

    def log(step: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)
        for reason in record.get("reasons", ()):
            writer.add_text("reasons", reason, step)
        writer.flush()

    return log
