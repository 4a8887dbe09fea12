"""The one torch.library of the project. Ops are defined with define + impl: a call costs a quarter of custom_op's."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("prmfast", "DEF")
