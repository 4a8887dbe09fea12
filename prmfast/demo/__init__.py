"""``prmfast demo``: the main job, end to end, on the embedded tiny world."""

from prmfast.demo.run import DemoResult, LiveRow, run_demo

__all__ = ["DemoResult", "LiveRow", "run_demo"]
