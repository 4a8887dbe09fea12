"""Ranges of versions of optional dependencies."""

from __future__ import annotations

import re

Version = tuple[int, int]


def spelled(oldest: Version, first_too_new: Version) -> str:
    """The range as pip has it."""
    return f">={oldest[0]}.{oldest[1]},<{first_too_new[0]}.{first_too_new[1]}"


def check_range(name: str, version: str, what: str, oldest: Version, first_too_new: Version) -> None:
    """RuntimeError unless ``version`` lies in the range; a build from sources without a number counts as newest."""
    number = re.match(r"v?(\d+)\.(\d+)", version)
    if number is None or version.startswith("0.0."):
        return
    if not oldest <= (int(number[1]), int(number[2])) < first_too_new:
        supported = spelled(oldest, first_too_new)
        raise RuntimeError(f"{what} needs {name} {supported}, found {version}; install a version in that range")
