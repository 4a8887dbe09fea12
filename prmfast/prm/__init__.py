"""Process reward models: released templates, score heads, one interface.

A new PRM is one small file: a subclass of `PRMAdapter` (`prmfast.prm.adapter`) that names the architectures it reads,
gives its `StepHead` and encodes a question and its steps. `AutoPRM.register` makes it known:

    class MyPRM(PRMAdapter):
        name = "my-prm"
        architectures = ("MyForProcessReward",)
        separator = "\\n\\n"

        def head(self, config, tokenizer=None):
            return ValueHead(config.hidden_size)

        def step_token(self, tokenizer):
            return "<step>"

        def text(self, question, steps):
            return f"{question}\\n" + "".join(f"{step}<step>" for step in steps or [""])

    AutoPRM.register(MyPRM())

`PRMAdapter.encode` finds the rows at the step token; an adapter whose rows are not at a token of their own (ReasonEval)
overrides it. Tests of a new adapter: golden token ids and the prefix property (tests/prm).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

if TYPE_CHECKING:
    from prmfast.prm import losses
    from prmfast.prm.adapter import EncodedChain, PRMAdapter, PRMError
    from prmfast.prm.auto import AutoPRM
    from prmfast.prm.heads import (
        ProcessRewardHead,
        QuantileHead,
        ReasonEvalHead,
        StepHead,
        TokenPairHead,
        ValueHead,
    )
    from prmfast.prm.implicit import ImplicitPRM, load_implicit_prm
    from prmfast.prm.load import load_prm
    from prmfast.prm.math_shepherd import MathShepherd
    from prmfast.prm.qwen import QwenMathPRM
    from prmfast.prm.reasoneval import ReasonEval
    from prmfast.prm.step_separator import StepSeparatorPRM
    from prmfast.prm.transformers_prm import TransformersPRM
    from prmfast.prm.value_head import ValueHeadPRM

_HOME = {
    "AutoPRM": "auto",
    "EncodedChain": "adapter",
    "ImplicitPRM": "implicit",
    "MathShepherd": "math_shepherd",
    "PRMAdapter": "adapter",
    "PRMError": "adapter",
    "ProcessRewardHead": "heads",
    "QuantileHead": "heads",
    "QwenMathPRM": "qwen",
    "ReasonEval": "reasoneval",
    "ReasonEvalHead": "heads",
    "StepHead": "heads",
    "StepSeparatorPRM": "step_separator",
    "TokenPairHead": "heads",
    "TransformersPRM": "transformers_prm",
    "ValueHead": "heads",
    "ValueHeadPRM": "value_head",
    "load_implicit_prm": "implicit",
    "load_prm": "load",
    "losses": "losses",
}

__all__ = [
    "AutoPRM",
    "EncodedChain",
    "ImplicitPRM",
    "MathShepherd",
    "PRMAdapter",
    "PRMError",
    "ProcessRewardHead",
    "QuantileHead",
    "QwenMathPRM",
    "ReasonEval",
    "ReasonEvalHead",
    "StepHead",
    "StepSeparatorPRM",
    "TokenPairHead",
    "TransformersPRM",
    "ValueHead",
    "ValueHeadPRM",
    "load_implicit_prm",
    "load_prm",
    "losses",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
