"""The task of the tiny world: chains of +, * and max over thirteen values, in a fixed layout.

A question is ``x op b op b ... ?`` padded with ``_`` to eight operations, so that operation i and step i are always the
same distance apart; an answer is ``r ; r ; # ans``. Results are modulo 13. ``max`` and ``* 0`` forgive earlier errors,
so a wrong step can still end well. Training traces carry an error rate that is fixed per fact (a, op, b); it is what
makes the policy fallible in a graded way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

VALUES = 13
MAX_STEPS = 8
OPERATIONS = ("+", "*", "max")
FILLER, ASK, STEP, FINAL = "_", "?", ";", "#"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
TOKENS = (PAD, EOS, UNK, *map(str, range(VALUES)), *OPERATIONS, FILLER, ASK, STEP, FINAL)
TOKEN_ID = {token: i for i, token in enumerate(TOKENS)}
VOCAB_SIZE = len(TOKENS)
PAD_ID, EOS_ID, UNK_ID = (TOKEN_ID[t] for t in (PAD, EOS, UNK))
FILLER_ID, ASK_ID, STEP_ID, FINAL_ID = (TOKEN_ID[t] for t in (FILLER, ASK, STEP, FINAL))
VALUE_0 = TOKEN_ID["0"]
OP_0 = TOKEN_ID["+"]
QUESTION_LENGTH = 2 * MAX_STEPS + 2
ANSWER_LENGTH = 2 * MAX_STEPS + 3  # eight "r ;", "# ans" and the end token
SPLITS = ("train", "calibration", "test")
# Shares of all questions, in 1/16: a question belongs to one split for ever, whatever seed drew it.
_SPLIT_ENDS = (8, 12, 16)


def encode(text: str) -> list[int]:
    """Token ids of a whitespace-separated text; equals the shipped Hugging Face tokenizer's ``encode``.

    Raises ValueError for a word that is not in the vocabulary (the Hugging Face tokenizer would give ``<unk>``).
    """
    try:
        return [TOKEN_ID[word] for word in text.split()]
    except KeyError as error:
        raise ValueError(f"text must hold words of the tiny vocabulary only, got {error.args[0]!r}") from None


def decode(ids: Sequence[int]) -> str:
    """Text of token ids, without padding and end tokens."""
    return " ".join(TOKENS[i] for i in ids if i not in (PAD_ID, EOS_ID))


def question_id(question: str) -> str:
    """Stable id of a question: the first 16 hex digits of BLAKE2b of its text."""
    return hashlib.blake2b(question.encode(), digest_size=8).hexdigest()


def apply_operation(op: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a op b`` modulo 13, elementwise; op indexes OPERATIONS, all int64 of one shape."""
    return torch.where(op == 0, (a + b) % VALUES, torch.where(op == 1, (a * b) % VALUES, torch.maximum(a, b)))


def make_questions(n: int, *, generator: torch.Generator, k_range: tuple[int, int] = (1, MAX_STEPS)) -> Tensor:
    """n random questions as token ids, int64 [n, 18]; the number of operations is uniform over k_range (inclusive)."""
    low, high = k_range
    if not 1 <= low <= high <= MAX_STEPS:
        raise ValueError(f"k_range must satisfy 1 <= low <= high <= {MAX_STEPS}, got {k_range}")
    k = torch.randint(low, high + 1, (n, 1), generator=generator)
    ops = torch.randint(0, len(OPERATIONS), (n, MAX_STEPS), generator=generator)
    values = torch.randint(0, VALUES, (n, MAX_STEPS + 1), generator=generator)
    used = torch.arange(MAX_STEPS) < k
    ids = torch.full((n, QUESTION_LENGTH), ASK_ID)
    ids[:, 0] = VALUE_0 + values[:, 0]
    ids[:, 1:-1:2] = torch.where(used, OP_0 + ops, FILLER_ID)
    ids[:, 2:-1:2] = torch.where(used, VALUE_0 + values[:, 1:], FILLER_ID)
    return ids


def split_index(questions: Tensor) -> Tensor:
    """Index into SPLITS for each question (ids [N, 18]): a fixed hash of the tokens, so that splits never overlap."""
    mixed = torch.zeros(len(questions), dtype=torch.int64)
    for column in questions.unbind(1):
        mixed = (mixed * 6364136223846793005 + column + 1442695040888963407) & ((1 << 62) - 1)
        mixed = mixed ^ (mixed >> 29)
    return torch.bucketize((mixed >> 20) & 15, torch.tensor(_SPLIT_ENDS), right=True)


def number_of_steps(questions: Tensor) -> Tensor:
    """How many operations each question (ids [N, 18]) has, int64 [N]."""
    return (questions[:, 1:-1:2] != FILLER_ID).sum(1)


def parse_question(question: str) -> list[int]:
    """Token ids (18) of one question text; ValueError unless it has the fixed layout."""
    words = question.split()
    ops, operands = words[1:-1:2], words[2:-1:2]
    k = sum(op != FILLER for op in ops)
    valid = len(words) == QUESTION_LENGTH and words[-1] == ASK and k >= 1 and _are_values(words[:1] + operands[:k])
    valid = valid and all(op in OPERATIONS for op in ops[:k]) and all(w == FILLER for w in ops[k:] + operands[k:])
    if not valid:
        raise ValueError(f"question must read 'x op b ... ?' with {MAX_STEPS} (op b) or (_ _) pairs, got {question!r}")
    return [TOKEN_ID[word] for word in words]


def _are_values(words: Sequence[str]) -> bool:
    return all(VALUE_0 <= TOKEN_ID.get(word, UNK_ID) < VALUE_0 + VALUES for word in words)


def true_results(questions: Tensor) -> Tensor:
    """Correct value after every operation, int64 [N, 8]; columns behind the last operation repeat the answer."""
    value = questions[:, 0] - VALUE_0
    columns = []
    for i in range(MAX_STEPS):
        op, operand = questions[:, 1 + 2 * i], questions[:, 2 + 2 * i]
        value = torch.where(op == FILLER_ID, value, apply_operation(op - OP_0, value, operand - VALUE_0))
        columns.append(value)
    return torch.stack(columns, 1)


def answer_of(question: str) -> int:
    """The correct answer of one question text."""
    parse_question(question)
    words = question.split()
    value = int(words[0])
    for op, operand in zip(words[1:-1:2], words[2:-1:2], strict=True):
        if op == "max":
            value = max(value, int(operand))
        elif op != FILLER:
            value = (value + int(operand) if op == "+" else value * int(operand)) % VALUES
    return value


def final_answer(completion: str) -> int | None:
    """The value behind ``#`` at the end of a completion, or None where there is no well-formed final answer."""
    words = completion.split()
    if len(words) < 2 or words[-2] != FINAL or words.count(FINAL) != 1:
        return None
    token = TOKEN_ID.get(words[-1], UNK_ID)
    return token - VALUE_0 if VALUE_0 <= token < VALUE_0 + VALUES else None


def verify(question: str, completion: str) -> bool:
    """Whether the completion ends in ``# ans`` with the correct answer; wrong steps before it do not matter.

    A malformed completion is wrong (False); a malformed question raises ValueError.
    """
    return answer_of(question) == final_answer(completion)


def split_steps(completion: str) -> list[str]:
    """Steps of a completion: every ``r ;`` and the closing ``# ans``; ``" ".join`` gives the completion back."""
    steps: list[str] = []
    current: list[str] = []
    for word in completion.split():
        current.append(word)
        if word == STEP:
            steps.append(" ".join(current))
            current = []
    if current:
        steps.append(" ".join(current))
    return steps


def are_correct(sequences: Tensor, length: Tensor, answers: Tensor) -> Tensor:
    """``verify`` for ended sequences: ids [S, T] with an end token at ``length - 1``, answers [S]; bool [S]."""
    rows = torch.arange(len(sequences))
    closed = (sequences[rows, length - 1] == EOS_ID) & (sequences[rows, length - 3] == FINAL_ID)
    once = (sequences == FINAL_ID).sum(1) == 1
    return closed & once & (sequences[rows, length - 2] == VALUE_0 + answers)


def fact_noise(*, generator: torch.Generator, scale: float = 0.55, shape: tuple[float, float] = (0.5, 1.6)) -> Tensor:
    """Error rate of every fact (op, a, b): ``scale * Beta(*shape)``, float32 [3, 13, 13]."""
    a, b = (torch.full((len(OPERATIONS), VALUES, VALUES), value) for value in shape)
    gamma_a, gamma_b = (torch._standard_gamma(value, generator=generator) for value in (a, b))
    return scale * gamma_a / (gamma_a + gamma_b)


def noisy_traces(questions: Tensor, noise: Tensor, *, generator: torch.Generator) -> Tensor:
    """Training sequences: question, answer with errors drawn at the facts' own rates, end token; int64 [N, 37].

    An erroneous result is uniform over the twelve wrong values, and the chain continues from it.
    """
    n = len(questions)
    k = number_of_steps(questions)
    answer = torch.full((n, ANSWER_LENGTH), PAD_ID)
    value = questions[:, 0] - VALUE_0
    for i in range(MAX_STEPS):
        used = k > i
        op = (questions[:, 1 + 2 * i] - OP_0).clamp(0, len(OPERATIONS) - 1)
        operand = (questions[:, 2 + 2 * i] - VALUE_0).clamp(0, VALUES - 1)
        wrong = torch.rand(n, generator=generator) < noise[op, value, operand]
        shift = torch.randint(1, VALUES, (n,), generator=generator)
        result = (apply_operation(op, value, operand) + wrong * shift) % VALUES
        value = torch.where(used, result, value)
        answer[:, 2 * i] = torch.where(used, VALUE_0 + value, PAD_ID)
        answer[:, 2 * i + 1] = torch.where(used, STEP_ID, PAD_ID)
    rows = torch.arange(n)
    answer[rows, 2 * k] = FINAL_ID
    answer[rows, 2 * k + 1] = VALUE_0 + value
    answer[rows, 2 * k + 2] = EOS_ID
    return torch.cat([questions, answer], 1)
