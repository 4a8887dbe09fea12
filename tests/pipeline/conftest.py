from __future__ import annotations

import pytest

from prmfast.tiny import TinyWorld


@pytest.fixture(scope="session")
def world() -> TinyWorld:
    return TinyWorld.load()
