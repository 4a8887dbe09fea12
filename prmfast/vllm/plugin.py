"""What vLLM calls by entry point, in every process that it starts: cheap, and harmless when called twice."""

from __future__ import annotations

from prmfast.vllm.arguments import ARCHITECTURES, OTHER

_MODEL = "prmfast.vllm.models:StepRewardModel"


def register() -> None:
    """Entry point of ``vllm.general_plugins``: makes the architectures known, by name, and bfloat16 safe on AMX.

    vLLM's attention for CPUs executes AMX instructions without asking the kernel for them first, which ends the process
    with SIGILL; torch asks once per process.
    """
    import torch
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    known = set(ModelRegistry.get_supported_archs())
    for architecture in (*ARCHITECTURES.values(), OTHER):
        if architecture not in known:
            ModelRegistry.register_model(architecture, _MODEL)
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def io_processor() -> str:
    """Entry point of ``vllm.io_processor_plugins``: the class's dotted name."""
    return "prmfast.vllm.io.PRMIOProcessor"
