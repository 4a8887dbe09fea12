"""The embedded default: a small policy, its miscalibrated PRM and their task, from weights shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prmfast._progress import progress as progress_bar
from prmfast.engines.random import sample_keys, text_key
from prmfast.tiny import task
from prmfast.tiny.decoder import MAX_LENGTH, Decoder
from prmfast.tiny.engine import TinyEngine, start_ids
from prmfast.tiny.policy import Policy
from prmfast.tiny.prm import TinyPRM, file_digest

if TYPE_CHECKING:
    import pyarrow as pa

    from prmfast.pipeline import Labeller, LabelSettings


_ANSWERS_A_CALL = 4096


@dataclass(frozen=True, slots=True)
class WorldInfo:
    """What was measured when the world was trained; success probabilities are of test questions with 1 to 8 steps."""

    miscalibration: str  # why the PRM's scores are wrong; show it wherever the scores are shown
    mean_success: float
    success_deciles: tuple[float, ...]  # 10, 25, 50, 75, 90 %
    graded_share: float  # questions with a success probability in (.1, .9)
    prm_empty: dict[str, float]  # at the empty answer: rank correlation with truth, bias, brier, irreducible
    prm_prefix: dict[str, float]  # the same at the steps of sampled answers
    training_seconds: dict[str, float]  # CPU seconds: policy, saving, rollouts, prm
    settings: dict[str, float]  # seed and sizes of the training run


class TinyWorld:
    """Policy, PRM, questions and truth in one object; ``TinyWorld.load()`` takes the shipped weights."""

    def __init__(self, policy: Policy, policy_id: str, prm: TinyPRM, info: WorldInfo) -> None:
        self.policy = policy
        self.engine = TinyEngine(Decoder(policy), policy_id)
        self.prm = prm
        self.info = info

    @classmethod
    def load(cls, directory: str | Path | None = None) -> TinyWorld:
        """From a directory that ``train_world`` wrote, or from the package; FileNotFoundError if a file is missing."""
        if directory is None:
            with resources.as_file(resources.files("prmfast.tiny") / "weights") as shipped:
                return cls.load(shipped)
        directory = Path(directory)
        fields = json.loads((directory / "world.json").read_text())
        fields["success_deciles"] = tuple(fields["success_deciles"])
        policy = Policy.load(directory / "policy")
        policy_id = f"prmfast/tiny-policy@{file_digest(directory / 'policy' / 'model.safetensors')}"
        return cls(policy, policy_id, TinyPRM.from_pretrained(directory / "prm", policy), WorldInfo(**fields))

    def questions(
        self, n: int, seed: int = 0, k_range: tuple[int, int] = (1, task.MAX_STEPS), *, split: str = "test"
    ) -> list[str]:
        """n distinct questions with k_range operations (inclusive).

        ``split`` is "train" (the policy and the PRM learned from it), "calibration" or "test". A question belongs to
        one split by a hash of its text, so splits are disjoint whatever the seeds; within a split, two seeds may share
        questions (short ones do). ValueError when the split has fewer than n.
        """
        return [task.decode(row) for row in draw_questions(n, seed=seed, k_range=k_range, split=split).tolist()]

    def verify(self, question: str, completion: str) -> bool:
        """Whether the completion's final answer is correct; see ``task.verify``."""
        return task.verify(question, completion)

    def true_success(
        self,
        questions: Sequence[str],
        prefixes: Sequence[str] | None = None,
        *,
        rollouts: int = 64,
        seed: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """How many of ``rollouts`` fresh samples succeed, int64 [B]: from the question, or from an answer begun.

        A prefix that already holds a final answer counts as what it is. The random numbers are not those of any
        ``engine.sample`` call; the same (question, prefix, seed) always gives the same count.
        """
        starts = prefixes if prefixes is not None else [""] * len(questions)
        if len(starts) != len(questions):
            raise ValueError(f"prefixes must have one entry per question ({len(questions)}), got {len(starts)}")
        return self._successes(list(zip(questions, starts, strict=True)), rollouts, f"truth {seed}", progress)

    def _successes(self, starts: Sequence[tuple[str, str]], rollouts: int, stream: str, progress: bool) -> Tensor:
        if rollouts < 1:
            raise ValueError(f"rollouts must be at least 1, got {rollouts}")
        counts = torch.zeros(len(starts), dtype=torch.int64)
        answer = {question: task.answer_of(question) for question in {question for question, _ in starts}}
        open_rows = []
        for i, (question, prefix) in enumerate(starts):
            if task.FINAL in prefix.split()[:-1]:
                counts[i] = rollouts * task.verify(question, prefix)
            else:
                open_rows.append(i)
        per_call = max(1, 8192 // rollouts)
        with progress_bar(len(open_rows) * rollouts, "rollouts", progress) as bar:
            for rows in _chunks(open_rows, per_call):
                ids = torch.full((len(rows), MAX_LENGTH), task.PAD_ID)
                for row, i in zip(ids, rows, strict=True):
                    begun = start_ids(*starts[i])
                    row[: len(begun)] = torch.tensor(begun)
                index = torch.arange(len(rows)).repeat_interleave(rollouts)
                keys = torch.tensor([text_key(f"{stream}|{starts[i][0]}|{starts[i][1]}") for i in rows])
                keys = sample_keys(keys[index], torch.arange(rollouts).repeat(len(rows)))
                drawn = self.engine.decoder.sample(ids, index, keys, temperature=self.engine.temperature)
                truth = torch.tensor([answer[starts[i][0]] for i in rows])[index]
                good = task.are_correct(drawn.ids, drawn.length, truth)
                counts[torch.tensor(rows)] = good.view(len(rows), rollouts).sum(1)
                bar.advance(len(rows) * rollouts)
        return counts

    def make_traces(
        self,
        n_questions: int,
        samples_per_question: int = 4,
        rollouts_per_prefix: int = 8,
        seed: int = 0,
        progress: bool = True,
        *,
        split: str = "calibration",
        k_range: tuple[int, int] = (1, task.MAX_STEPS),
    ) -> pa.Table:
        """A validated trace table (``prmfast.traces``): sampled answers, PRM scores and states, Monte-Carlo labels.

        ``rollouts_per_prefix`` fresh rollouts from every step's prefix and from every empty answer; 0 leaves those
        four columns out. Rollouts of different rows are independent of each other and of the samples.
        """
        for name, value in (("n_questions", n_questions), ("samples_per_question", samples_per_question)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if rollouts_per_prefix < 0:
            raise ValueError(f"rollouts_per_prefix must be at least 0, got {rollouts_per_prefix}")
        questions = self.questions(n_questions, seed, k_range, split=split)
        rows = [(question, j) for question in questions for j in range(samples_per_question)]
        seeds = [text_key(f"trace {seed} {j}") & (2**63 - 1) for _, j in rows]
        with progress_bar(len(rows), "answers", progress) as bar:
            texts = []
            for part in _chunks(list(range(len(rows))), _ANSWERS_A_CALL):
                done = self.engine.sample([rows[i][0] for i in part], [seeds[i] for i in part])
                texts += [completion.text for completion in done]
                bar.advance(len(part))
        columns = self._sample_columns(questions, rows, texts, progress)
        if rollouts_per_prefix:
            columns |= self._rollout_columns(questions, rows, columns["steps"], rollouts_per_prefix, seed, progress)
        import pyarrow as pa

        from prmfast.traces import SCHEMA, validate

        return validate(pa.table({name: pa.array(values, SCHEMA[name]) for name, values in columns.items()}))

    def _sample_columns(
        self, questions: list[str], rows: list[tuple[str, int]], texts: list[str], progress: bool
    ) -> dict[str, list[Any]]:
        per_question = len(rows) // len(questions)
        judged: list[tuple[Tensor, Tensor]] = []
        with progress_bar(len(questions), "PRM scores", progress) as bar:
            for part in _chunks(list(range(len(questions))), max(1, _ANSWERS_A_CALL // per_question)):
                answers = [texts[i * per_question : (i + 1) * per_question] for i in part]
                judged += [j for row in self.prm.step_outputs([questions[i] for i in part], answers) for j in row]
                bar.advance(len(part))
        score, state = self.prm.question_state(questions)
        return {
            "question_id": [task.question_id(question) for question, _ in rows],
            "question": [question for question, _ in rows],
            "policy_id": [self.engine.policy_id] * len(rows),
            "sample_id": [str(j) for _, j in rows],
            "completion": texts,
            "steps": [task.split_steps(text) for text in texts],
            "prm_step_scores": [scores.tolist() for scores, _ in judged],
            "correct": [task.verify(question, text) for (question, _), text in zip(rows, texts, strict=True)],
            "hidden_states": [states.tolist() for _, states in judged],
            "question_score": [value for value in score.tolist() for _ in range(per_question)],
            "question_hidden": [value for value in state.tolist() for _ in range(per_question)],
        }

    def _rollout_columns(
        self,
        questions: list[str],
        rows: list[tuple[str, int]],
        steps: list[list[str]],
        rollouts: int,
        seed: int,
        progress: bool,
    ) -> dict[str, list[Any]]:
        per_question = len(rows) // len(questions)
        at_question = self._successes([(q, "") for q in questions], rollouts, f"trace {seed}", progress).tolist()
        # One stream per sample number: equal prefixes of two samples get rollouts of their own.
        by_sample: list[list[list[int]]] = []
        for j in range(per_question):
            mine = range(j, len(rows), per_question)
            starts = [(rows[i][0], " ".join(steps[i][: t + 1])) for i in mine for t in range(len(steps[i]))]
            found = self._successes(starts, rollouts, f"trace {seed} sample {j}", progress)
            by_sample.append([part.tolist() for part in found.split([len(steps[i]) for i in mine])])
        return {
            "step_successes": [by_sample[i % per_question][i // per_question] for i in range(len(rows))],
            "step_trials": [[rollouts] * len(row) for row in steps],
            "question_successes": [k for k in at_question for _ in range(per_question)],
            "question_trials": [rollouts] * len(rows),
        }

    def labeller(self, settings: LabelSettings | None = None, *, temperature: float = 1.0) -> Labeller:
        """This world for ``prmfast.pipeline.label_questions``: engine, verifier, PRM and where its answers are cut."""
        from prmfast.pipeline import Labeller, LabelSettings, SplitAfter

        engine = TinyEngine(self.engine.decoder, self.engine.policy_id, temperature=temperature)
        return Labeller(engine, self.verify, self.prm, SplitAfter(task.STEP), settings or LabelSettings())

    def tokenizer(self) -> Any:
        """The policy's Hugging Face tokenizer (needs transformers)."""
        from prmfast.tiny.tokenizer import build_tokenizer

        return build_tokenizer()

    @staticmethod
    def policy_directory() -> Path:
        """Where the shipped policy lies: a Hugging Face Qwen2 checkpoint that other engines load.

        Its tokenizer lies in ``tokenizer_directory()`` and must be named apart: ``vllm.LLM(model, tokenizer=...)``.
        """
        return Path(str(resources.files("prmfast.tiny") / "weights" / "policy"))

    @staticmethod
    def tokenizer_directory() -> Path:
        """Where the shipped tokenizer lies, for ``AutoTokenizer.from_pretrained``."""
        return Path(str(resources.files("prmfast.tiny") / "weights" / "tokenizer"))


def draw_questions(n: int, *, seed: int, k_range: tuple[int, int], split: str) -> Tensor:
    """n distinct questions of one split as token ids [n, 18]; see ``TinyWorld.questions``."""
    if split not in task.SPLITS:
        raise ValueError(f"split must be one of {', '.join(task.SPLITS)}, got {split!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(64):
        batch = task.make_questions(4 * n + 64, generator=generator, k_range=k_range)
        batch = batch[task.split_index(batch) == task.SPLITS.index(split)]
        found.update(dict.fromkeys(map(tuple, batch.tolist())))
        if len(found) >= n:
            return torch.tensor(list(found)[:n])
    raise ValueError(f"n must be at most about {len(found)} for k_range {k_range} and split {split!r}, got {n}")


def info_to_json(info: WorldInfo) -> str:
    """The text of world.json."""
    return json.dumps(asdict(info), indent=2) + "\n"


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
