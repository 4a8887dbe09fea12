"""The out-of-tree model: any of vLLM's decoders with a PRM's head behind step rows. Workers import this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.utils.import_utils import resolve_obj_by_qualname

from prmfast.prm.adapter import PRMError
from prmfast.vllm.arguments import BACKBONES, check_engine
from prmfast.vllm.pooler import StepPooler


@default_pooling_type(tok_pooling_type="ALL")  # "STEP" would turn chunked prefill and prefix caching off
class StepRewardModel(nn.Module, SupportsPP):
    """One class for all PRMs: the architecture's name, or the settings, say which adapter made the head."""

    is_pooling_model = True
    packed_modules_mapping = {  # noqa: RUF012 - vLLM's own name and type
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        config = model.hf_config
        settings, adapter, tokenizer = check_engine(vllm_config, None, None)
        adapter.check(config, tokenizer)
        if config.model_type not in BACKBONES:
            raise PRMError(f"config.model_type must be one of {', '.join(BACKBONES)}, got {config.model_type!r}")
        settings = settings.model_copy(update={"step_token_id": adapter.step_token_id(tokenizer)})
        self.name = f"{adapter.name} ({model.model})"
        self.model = resolve_obj_by_qualname(BACKBONES[config.model_type])(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        # float32 whatever the model's dtype is: half precision would show in the scores
        head = adapter.head(config, tokenizer).float()
        self.pooler = StepPooler(head, settings, int(config.hidden_size))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The decoder's embedding."""
        embed: Any = self.model.embed_input_ids  # a Module's attributes are typed as tensors and modules
        out: Tensor = embed(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Hidden states [tokens, d] behind the last norm: what the pooler takes its rows from."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Decoder and head; of a language model's head only the rows that judge. PRMError if some are absent."""
        head = self.pooler.head
        for_head: dict[str, Tensor] = {}

        def for_decoder() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in head.checkpoint_names:
                    for_head[name] = tensor
                if name.startswith("model."):
                    yield name, tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(for_decoder())
        try:
            head.load(for_head)
        except (KeyError, ValueError) as error:
            raise PRMError(f"the checkpoint is no {self.name}: {error.args[0]}") from error
        return loaded | {f"pooler.head.{name}" for name, _ in head.named_parameters()}
