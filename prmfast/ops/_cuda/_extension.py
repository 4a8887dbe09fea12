"""The CUDA half of the compiled extension, or an ImportError that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from prmfast.ops._cpu._extension import _C

if not hasattr(_C, "cuda"):
    raise ImportError("the compiled extension was built without CUDA; build it with `PRMFAST_CUDA=1 pip install -e .`")
if not torch.cuda.is_available() or torch.version.hip is not None:
    raise ImportError(f"torch {torch.__version__} sees no CUDA device")
if _C.cuda.device_count() == 0:
    raise ImportError(
        f"the extension sees no CUDA device: its runtime {_C.cuda.runtime_version() // 1000}."
        f"{_C.cuda.runtime_version() % 1000 // 10} may need a newer driver"
    )

__all__ = ["_C", "stream_of"]


@contextlib.contextmanager
def stream_of(tensor: Tensor) -> Iterator[int]:
    """The handle of torch's current stream on the tensor's device; launches go to that device meanwhile."""
    with torch.cuda.device(tensor.device):
        yield int(torch.cuda.current_stream().cuda_stream)
