"""``prmfast demo``: the main job, end to end, on the embedded tiny world."""

from prmfast.demo.result import DemoResult, LiveRow
from prmfast.demo.run import run_demo

__all__ = ["DemoResult", "LiveRow", "run_demo"]
