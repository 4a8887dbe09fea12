"""How an engine for a PRM is started, and whether a running one is: mistakes are told before the first request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prmfast._vllm import require_vllm
from prmfast.vllm.settings import KEY, Levels, PRMSettings

if TYPE_CHECKING:
    from prmfast.prm.adapter import PRMAdapter

ARCHITECTURES = {
    "qwen2.5-math-prm": "PrmfastQwenMathPRM",
    "reasoneval": "PrmfastReasonEval",
    "math-shepherd": "PrmfastMathShepherd",
    "pqm": "PrmfastPQM",
}
"""Architecture by adapter. Registered adapters of one's own run under `OTHER`, named in the settings."""
BACKBONES = {
    "qwen2": "vllm.model_executor.models.qwen2.Qwen2Model",
    "qwen3": "vllm.model_executor.models.qwen3.Qwen3Model",
    "llama": "vllm.model_executor.models.llama.LlamaModel",
    "mistral": "vllm.model_executor.models.mistral.MistralModel",
}
"""Decoder without head by the config's model_type; all of them name their weights ``model.*``."""
OTHER = "PrmfastStepRewardModel"
IO_PROCESSOR = "prmfast"


def prm_engine_args(
    model: str | os.PathLike[str],
    *,
    adapter: str | PRMAdapter | None = None,
    calibrator: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    prm_id: str | None = None,
    policy_id: str | None = None,
    levels: Levels | None = None,
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    additional_config: Mapping[str, Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Arguments for ``vllm.LLM`` and ``AsyncEngineArgs``: a PRM with chunked prefill and prefix caching on.

    Args:
        model: folder or hub id of a released PRM. revision: of the hub id.
        adapter: a name or an adapter, where the checkpoint's config does not say which PRM it is.
        calibrator: a folder that `Calibrator.save_pretrained` wrote, or folders by name.
        prm_id: defaults as in `AutoPRM.from_pretrained`; policy_id: whose answers are judged. Calibrators fitted for
            another PRM or policy are refused.
        levels: quantiles for requests that name none.
        engine: any other engine argument (``dtype``, ``max_model_len``, ``gpu_memory_utilization``, ...).

    Raises:
        PRMError: no adapter matches, or the tokenizer does not have the step token. ArtifactError: a calibrator does
        not fit. ImportError, RuntimeError: vLLM is missing, of another version, or did not load prmfast's plugin.
    """
    require_vllm("prm_engine_args")
    check_plugin()
    from transformers import AutoConfig, AutoTokenizer
    from vllm.config import PoolerConfig

    from prmfast.prm.adapter import PRMError
    from prmfast.prm.auto import AutoPRM, Checkpoint, default_prm_id
    from prmfast.vllm.estimates import load_checked

    name = os.fspath(model)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    chosen = AutoPRM.adapter(config, Checkpoint(name, revision).names, choice=adapter)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    chosen.check(config, tokenizer)
    if config.model_type not in BACKBONES:
        raise PRMError(
            f"{name}: config.model_type must be one of {', '.join(BACKBONES)} for a PRM on vLLM, got "
            f"{config.model_type!r}; AutoPRM.from_pretrained reads it with transformers"
        )
    artifacts = {"default": calibrator} if isinstance(calibrator, (str, os.PathLike)) else dict(calibrator or {})
    given: dict[str, Any] = {
        "adapter": chosen.name,
        "prm_id": prm_id or default_prm_id(name, revision),
        "policy_id": policy_id,
        "step_token_id": chosen.step_token_id(tokenizer),
        "calibrator": {key: os.path.abspath(os.fspath(path)) for key, path in artifacts.items()},
    }
    settings = PRMSettings.read(given if levels is None else given | {"levels": levels}, "prm_engine_args")
    for key, path in settings.calibrator.items():
        load_checked(key, path, settings, int(config.hidden_size))
    return {
        "model": name,
        "revision": revision,
        "runner": "pooling",
        "pooler_config": PoolerConfig(tok_pooling_type="ALL"),
        "hf_overrides": {**(hf_overrides or {}), "architectures": [ARCHITECTURES.get(chosen.name, OTHER)]},
        "additional_config": {**(additional_config or {}), KEY: settings.model_dump(exclude_defaults=True)},
        "io_processor_plugin": IO_PROCESSOR,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        **engine,
    }


def prm_server_args(model: str | os.PathLike[str], **options: Any) -> list[str]:
    """Command-line arguments of ``python -m vllm.entrypoints.openai.api_server`` for a PRM.

    Options as in `prm_engine_args`. ``["--model", name, "--runner", "pooling", ...]``; ``vllm serve`` takes the same
    without the first word.
    """
    arguments = prm_engine_args(model, **options)
    out = ["--model", arguments.pop("model")]
    arguments["pooler_config"] = {"tok_pooling_type": arguments["pooler_config"].tok_pooling_type}
    for key, value in arguments.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            out += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return out


def check_plugin() -> None:
    """RuntimeError where vLLM runs without prmfast's architectures in this process."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    absent = {*ARCHITECTURES.values(), OTHER} - set(ModelRegistry.get_supported_archs())
    if absent:
        allowed = os.environ.get("VLLM_PLUGINS")
        why = (
            f"VLLM_PLUGINS={allowed} does not name it: add prmfast to that list, or unset it"
            if allowed is not None and KEY not in allowed.split(",")
            else "its entry point is not in vLLM's environment, or failed (vLLM logs why); pip install prmfast"
        )
        raise RuntimeError(f"vLLM did not load the plugin of prmfast ({', '.join(sorted(absent))} unknown): {why}")


def check_engine(config: Any, adapter: PRMAdapter | None, tokenizer: Any) -> tuple[PRMSettings, PRMAdapter, Any]:
    """Settings, adapter and tokenizer of an engine's ``vllm_config``; RuntimeError where it serves no such PRM."""
    from prmfast.prm.auto import AutoPRM, default_prm_id

    model = config.model_config
    ours = {*ARCHITECTURES.values(), OTHER} & set(model.architectures)
    if not ours:
        raise RuntimeError(
            f"the engine serves {model.model} as {', '.join(model.architectures)}, which is none of prmfast's PRMs; "
            "start it with vllm.LLM(**prmfast.vllm.prm_engine_args(model))"
        )
    settings = PRMSettings.of(config.additional_config)
    settings = settings.model_copy(update={"prm_id": settings.prm_id or default_prm_id(model.model, model.revision)})
    name = adapter_name(ours.pop(), settings)
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=False
        )
    return settings, adapter or AutoPRM.adapter(model.hf_config, choice=name), tokenizer


def adapter_name(architecture: str, settings: PRMSettings) -> str:
    """The adapter of a registered architecture; ValueError where neither the name nor the settings say."""
    names = {value: key for key, value in ARCHITECTURES.items()}
    if architecture in names:
        return names[architecture]
    if settings.adapter is None:
        raise ValueError(f'additional_config["{KEY}"]["adapter"] must name the adapter of {architecture}, got none')
    return settings.adapter
