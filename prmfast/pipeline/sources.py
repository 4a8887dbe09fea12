"""What `prmfast label` takes by name: a file of questions, a policy of transformers, a PRM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prmfast.pipeline.labeller import Labeller, LabelSettings
from prmfast.pipeline.steps import SplitAfter
from prmfast.pipeline.verify import MathVerifier

if TYPE_CHECKING:
    from prmfast.engines import TransformersEngine


def read_questions(path: str | os.PathLike[str]) -> pa.Table:
    """A table of questions from a parquet or JSON-lines file; columns as `prmfast.pipeline.labeller.question_table`.

    ValueError for a file of another kind, FileNotFoundError.
    """
    file = Path(path)
    if file.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"questions must be a .parquet or .jsonl file, got {file.name!r}")
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        if file.suffix == ".jsonl":
            import pyarrow.json

            return pyarrow.json.read_json(file)
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} must be {file.suffix[1:]}: {error}") from error


def reference_answers(table: pa.Table) -> dict[str, str]:
    """Question to right answer, from the columns question and answer; ValueError without them."""
    for name in ("question", "answer"):
        if name not in table.column_names:
            raise ValueError(f"questions must have a column {name}, got {', '.join(table.column_names)}")
    answers = [None if value is None else str(value) for value in table.column("answer").to_pylist()]
    if None in answers:
        raise ValueError(f"questions[{answers.index(None)}]: answer must be known, got null")
    return dict(zip(table.column("question").to_pylist(), (str(answer) for answer in answers), strict=True))


def policy_job(
    table: pa.Table,
    policy: str,
    prm: str | None,
    settings: LabelSettings,
    *,
    max_new_tokens: int,
    temperature: float,
) -> tuple[pa.Table, Labeller]:
    """Questions with the policy's prompts, and a labeller of policy and PRM, answers checked by math-verify."""
    verifier = MathVerifier(reference_answers(table))
    scorer = None
    if prm is not None:
        from prmfast.prm import AutoPRM

        scorer = AutoPRM.from_pretrained(prm)
    engine = load_policy(policy, max_new_tokens=max_new_tokens, temperature=temperature)
    if "prompt" not in table.column_names:
        prompts = chat_prompts(engine.tokenizer, table.column("question").to_pylist())
        table = table.append_column("prompt", pa.array(prompts, pa.string()))
    splitter = SplitAfter() if scorer is None else SplitAfter(scorer.adapter.separator)
    return table, Labeller(engine, verifier, scorer, splitter, settings)


def load_policy(name: str, *, max_new_tokens: int, temperature: float) -> TransformersEngine:
    """A causal language model by hub id or folder, in the checkpoint's dtype, on a GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prmfast.engines import TransformersEngine

    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return TransformersEngine(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, policy_id=name)


def chat_prompts(tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Each question as the user's turn of the tokenizer's chat template; as it is, without one.

    A template's own begin token is left out: the tokenizer puts one before every prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(questions)
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]
    begin = getattr(tokenizer, "bos_token", None)
    return [prompt.removeprefix(begin) if begin else prompt for prompt in prompts]
