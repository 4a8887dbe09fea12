"""Conversations: checked messages, and token ids with a mask over the last answer, cut from the front ([V])."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT files


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids and, of the same length, whether each belongs to the last answer."""

    token_ids: tuple[int, ...]
    answer_mask: tuple[bool, ...]


def read_messages(name: str, value: Any) -> tuple[Message, ...]:
    """Messages of ``{"role", "content"}`` or ``{"from", "value"}``; "human" and "gpt" become "user" and "assistant".

    ValueError that names what is wrong where it is no such list or empty.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or len(value) == 0:
        raise ValueError(
            f"{name} must be a list of messages with at least one, got {type(value).__name__} {value!r:.60}"
        )
    messages = []
    for i, item in enumerate(value):
        if isinstance(item, Message):
            messages.append(item)
            continue
        keys = ("role", "content") if isinstance(item, Mapping) and "role" in item else ("from", "value")
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in keys):
            raise ValueError(
                f'{name}[{i}] must have strings "role" and "content" or "from" and "value", got {item!r:.60}'
            )
        role, content = (str(item[key]) for key in keys)
        messages.append(Message(_ROLES.get(role, role), content))
    return tuple(messages)


def encode_conversation(
    conversation: Sequence[Message] | Sequence[Mapping[str, str]], tokenizer: Any, *, max_length: int
) -> EncodedConversation:
    """Token ids of the chat template, at most ``max_length``, with the last answer marked.

    The answer, to its end-of-turn, is what the template adds to the prompt with its generation prefix; in a
    conversation of one message it is everything. Too long, the end of the answer is kept first, then the end of the
    prompt. tokenizer: of transformers, with a chat template.

    ValueError for max_length < 1, for a conversation that does not end with the assistant, and for a template whose
    text of the whole does not begin with its text of the prompt.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    before, answer = (
        [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in conversation_texts(conversation, tokenizer)
    )
    answer = answer[-max_length:]
    room = max_length - len(answer)
    before = before[-room:] if room else []
    return EncodedConversation((*before, *answer), (False,) * len(before) + (True,) * len(answer))


def conversation_texts(
    conversation: Sequence[Message] | Sequence[Mapping[str, str]], tokenizer: Any
) -> tuple[str, str]:
    """The chat template's text of a conversation: its prompt and the last answer, which are tokenised apart.

    ValueError as in `encode_conversation`.
    """
    messages = read_messages("conversation", conversation)
    if messages[-1].role != "assistant":
        raise ValueError(f"conversation must end with the assistant's message, got role {messages[-1].role!r}")
    turns = [message._asdict() for message in messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True) if turns[1:] else ""
    if not whole.startswith(prompt):
        raise ValueError(
            "tokenizer must have a chat template whose conversation begins with its prompt, got a prompt that ends in "
            f"{prompt[-40:]!r}; a template that removes earlier reasoning cannot be trained on"
        )
    return prompt, whole[len(prompt) :]


def prompt_id(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """16 hexadecimal digits that are equal for equal prompts: SHA-1 of the text, or of the messages as sorted JSON."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:16]
