"""AutoPRM and TransformersPRM against plain models of the released architectures, random weights, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from prmfast.calibration import ArtifactError, CalibrationData, Calibrator, LogisticCalibrator
from prmfast.calibration import QuantileRegressionCalibrator as QuantileRegression
from prmfast.calibration.features import FEATURE_NAMES, prefix_features, question_features
from prmfast.engines import Judge, Scorer
from prmfast.prm import AutoPRM, MathShepherd, PRMAdapter, PRMError, ReasonEval, TransformersPRM, ValueHead
from tests.prm.models import make, save

KINDS = ("qwen", "shepherd", "shepherd-llama", "reasoneval", "reasoneval-34b", "pqm")
NAMES = {"qwen": "qwen2.5-math-prm", "pqm": "pqm", "reasoneval": "reasoneval", "shepherd": "math-shepherd"}
QUESTIONS = ["What is 1+1?", "Q2", "How many eggs has Janet, if she has 3 and finds 4 more?"]
ANSWERS = [
    ["Step 1: one\n\nStep 2: 1+1=2\n\nStep 3: the answer is 2", "2"],
    [],
    ["Step 1: 3+4\n\nStep 2: 7", "", "Step 1: 3\n\nStep 2: 4\n\nStep 3: 3+4\n\nStep 4: 7\n\nStep 5: 7 eggs"],
]


class Loaded:
    """A saved checkpoint, its reference in float64, and what AutoPRM makes of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.model, self.tokenizer = save(kind, folder)
        self.prm = AutoPRM.from_pretrained(folder, dtype=torch.float64)
        self.kind = kind

    def reference(self, question: str, answer: str | None) -> tuple[Tensor, Tensor]:
        """Scores and hidden states of one chain: the whole model, no batch, no padding, every position's logits."""
        adapter = self.prm.adapter
        chain = adapter.encode(self.tokenizer, question, [] if answer is None else adapter.split_steps(answer))
        ids, rows = torch.tensor([chain.token_ids]), list(chain.step_positions)
        hidden = self.model.model(ids).last_hidden_state[0, rows]
        out = self.model(ids)
        if self.kind.startswith("shepherd"):
            good, bad = self.tokenizer.encode("+ -", add_special_tokens=False)
            return out.logits[0, rows][:, [good, bad]].softmax(-1)[:, 0], hidden
        if self.kind.startswith("reasoneval"):
            return out[0, rows].softmax(-1)[:, 1:].sum(-1), hidden
        return (out[0, rows].softmax(-1)[:, 1] if self.kind == "qwen" else out[0, rows, 0].sigmoid()), hidden


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("checkpoints")
    with torch.no_grad():
        return {kind: Loaded(kind, folder / f"tiny-{kind}") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_and_states_are_those_of_the_plain_model(loaded: dict[str, Loaded], kind: str) -> None:
    one = loaded[kind]
    assert one.prm.adapter.name == NAMES[kind.removesuffix("-llama").removesuffix("-34b")]
    assert isinstance(one.prm, Scorer)
    assert isinstance(one.prm, Judge)
    scores, states = one.prm.score(QUESTIONS, ANSWERS), one.prm.features(QUESTIONS, ANSWERS)
    assert [len(row) for row in scores] == [len(row) for row in states] == [2, 0, 3]
    seen = []
    for question, answers, score_row, state_row in zip(QUESTIONS, ANSWERS, scores, states, strict=True):
        for answer, score, state in zip(answers, score_row, state_row, strict=True):
            if not answer:
                assert score == []
                assert state.shape == (0, 64)
                continue
            p, hidden = one.reference(question, answer)
            torch.testing.assert_close(torch.tensor(score), p.float(), rtol=0, atol=1e-6)
            torch.testing.assert_close(state, hidden.float(), rtol=0, atol=1e-5)
            seen += score
    assert len(seen) == 3 + 1 + 2 + 5
    assert max(seen) - min(seen) > 0.05  # random weights, but scores that differ
    score, state = one.prm.question_state(QUESTIONS)
    for i, question in enumerate(QUESTIONS):
        p, hidden = one.reference(question, None)
        torch.testing.assert_close(score[i : i + 1], p.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(state[i : i + 1], hidden.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_a_batch_of_many(loaded: dict[str, Loaded], kind: str) -> None:
    one = loaded[kind].prm
    single = TransformersPRM(one.model, one.head, one.tokenizer, one.adapter, prm_id="x", batch_size=1)
    questions = [question for question, answers in zip(QUESTIONS, ANSWERS, strict=True) for _ in answers]
    answers = [answer for row in ANSWERS for answer in row]
    many = one.judge([*questions, *QUESTIONS], [*answers, None, None, None])
    for i, (question, answer) in enumerate(zip([*questions, *QUESTIONS], [*answers, None, None, None], strict=True)):
        (alone,) = single.judge([question], [answer])
        torch.testing.assert_close(torch.tensor(many[i].scores), torch.tensor(alone.scores), rtol=0, atol=1e-6)
        assert alone.quantiles is None
    assert [list(row.scores) for row in many[: len(answers)]] == [
        s for row in one.score(QUESTIONS, ANSWERS) for s in row
    ]


def test_float32_agrees_with_float64(loaded: dict[str, Loaded]) -> None:
    one = loaded["qwen"]
    single = AutoPRM.from_pretrained(one.folder)
    assert single.model.dtype == torch.float32
    for a, b in zip(single.judge(QUESTIONS, [None, "a", "b"]), one.prm.judge(QUESTIONS, [None, "a", "b"]), strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-4)


def test_half_precision_keeps_the_head_in_float32(loaded: dict[str, Loaded]) -> None:
    half = AutoPRM.from_pretrained(loaded["qwen"].folder, dtype=torch.bfloat16, device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    assert half.question_state(["Q"])[1].dtype == torch.float32


def test_equal_chains_run_once_and_nothing_runs_for_nothing(loaded: dict[str, Loaded]) -> None:
    prm = loaded["qwen"].prm
    rows: list[int] = []
    handle = prm.model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        first, second, nothing = prm.judge(["Q", "Q", "Q"], ["a\n\nb", "a\n\nb", ""])
        assert prm.judge([], []) == []
        assert prm.score([], []) == []
        assert prm.score(["Q"], [[]]) == prm.features(["Q"], [[]]) == [[]]
        score, state = prm.question_state([])
    finally:
        handle.remove()
    assert rows == [1]
    assert first == second
    assert nothing.scores == ()
    assert (tuple(score.shape), tuple(state.shape)) == ((0,), (0, 64))


def test_the_backbone_runs_without_the_vocabulary(loaded: dict[str, Loaded]) -> None:
    prm = loaded["shepherd"].prm
    assert type(prm.model).__name__ == "MistralModel"
    assert prm.head.weight.shape == (2, 64)


def test_tied_embeddings_serve_as_lm_head(tmp_path: Path) -> None:
    folder, model, tokenizer = save("shepherd", tmp_path / "shepherd", tie_word_embeddings=True)
    prm = AutoPRM.from_pretrained(folder, dtype=torch.float64)
    rows = tokenizer.encode("+ -", add_special_tokens=False)
    assert torch.equal(prm.head.weight, model.model.embed_tokens.weight[rows])


def test_a_pytorch_file_and_shards_are_read_too(loaded: dict[str, Loaded], tmp_path: Path) -> None:
    one = loaded["pqm"]
    expected = one.prm.question_state(QUESTIONS)[0]
    sharded = tmp_path / "sharded"
    one.model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    old = tmp_path / "old"
    old.mkdir()
    torch.save(one.model.state_dict(), old / "pytorch_model.bin")
    for folder in (sharded, old):
        (folder / "config.json").write_text((one.folder / "config.json").read_text())
        one.tokenizer.save_pretrained(folder)
        found = AutoPRM.from_pretrained(folder, dtype=torch.float64).question_state(QUESTIONS)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --- calibrators -------------------------------------------------------------------------------------------------


def calibration_data(prm_id: str | None, width: int | None = 64, features: bool = True) -> CalibrationData:
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(80, generator=generator)
    columns = torch.cat([torch.from_numpy(prefix_features(part.tolist())) for part in score.split(4)]).float()
    return CalibrationData.from_arrays(
        score=score,
        successes=(torch.rand(80, generator=generator) < score).long(),
        hidden=None if width is None else torch.randn(80, width, generator=generator),
        features=columns if features else torch.rand(80, 1, generator=generator),
        feature_names=FEATURE_NAMES if features else ("length",),
        prm_id=prm_id,
    )


def fitted(prm_id: str | None = "tiny-qwen", network: bool = False, **kwargs: Any) -> Calibrator:
    calibrator: Calibrator = QuantileRegression(encoder=(8,), steps=2) if network else LogisticCalibrator()
    return calibrator.fit(calibration_data(prm_id, **kwargs), progress=False)


def test_judge_gives_the_calibrators_quantiles(loaded: dict[str, Loaded]) -> None:
    one, calibrator = loaded["qwen"], fitted()
    prm = AutoPRM.from_pretrained(one.folder, dtype=torch.float64, calibrator=calibrator, levels=4)
    answers = [None, "a\n\nb\n\nc", ""]
    judged = prm.judge(QUESTIONS, answers)
    plain = one.prm.judge(QUESTIONS, answers)
    assert [row.scores for row in judged] == [row.scores for row in plain]
    for i, row in enumerate(judged[:2]):
        if answers[i] is None:
            hidden = prm.question_state(QUESTIONS[i : i + 1])[1]
            features = question_features(row.scores)
        else:
            hidden = prm.features(QUESTIONS[i : i + 1], [[answers[i]]])[0][0]
            features = prefix_features(row.scores)
        data = CalibrationData.from_arrays(
            score=torch.tensor(row.scores),
            successes=[0] * len(row.scores),
            hidden=hidden,
            features=features,
            feature_names=FEATURE_NAMES,
        )
        assert row.quantiles is not None
        assert row.quantiles.dtype == torch.float32
        torch.testing.assert_close(row.quantiles, calibrator.quantile(data, [0.125, 0.375, 0.625, 0.875]))
    assert judged[2].quantiles is not None
    assert tuple(judged[2].quantiles.shape) == (0, 4)
    assert prm.judge([], []) == []


@pytest.mark.parametrize(
    ("make_calibrator", "message"),
    [
        (
            lambda: fitted("other-prm"),
            "fitted for prm_id 'other-prm', this is 'tiny-qwen'.*fit one on traces of this prm",
        ),
        (lambda: fitted(width=32, network=True), "hidden states of width 32, this PRM's have width 64"),
        (lambda: fitted(width=None, features=False), "features that a PRM's scores do not give: length"),
    ],
)
def test_a_foreign_calibrator_is_refused_at_construction(
    loaded: dict[str, Loaded], make_calibrator: Any, message: str
) -> None:
    calibrator = make_calibrator()
    with pytest.raises(ArtifactError, match=message):
        AutoPRM.from_pretrained(loaded["qwen"].folder, calibrator=calibrator)


def test_the_same_prm_under_another_name_can_be_said(loaded: dict[str, Loaded]) -> None:
    prm = AutoPRM.from_pretrained(loaded["qwen"].folder, calibrator=fitted("Qwen/tiny"), prm_id="Qwen/tiny")
    assert prm.prm_id == "Qwen/tiny"
    assert AutoPRM.from_pretrained(loaded["qwen"].folder, calibrator=fitted(None)).prm_id == "tiny-qwen"


def test_a_network_calibrator_reads_the_hidden_states(loaded: dict[str, Loaded]) -> None:
    calibrator = fitted(network=True)
    assert calibrator.hidden_width_ == 64
    (row,) = AutoPRM.from_pretrained(loaded["qwen"].folder, calibrator=calibrator).judge(["Q"], ["a\n\nb"])
    assert row.quantiles is not None
    assert tuple(row.quantiles.shape) == (2, 100)
    assert bool((row.quantiles >= 0).all() & (row.quantiles <= 1).all())


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("questions", "answers", "error", "message"),
    [
        ("Q", ["a"], TypeError, "questions must be a sequence of strings, got one string 'Q'"),
        (["Q"], "a", TypeError, "answers must be a sequence of strings or None, got one string 'a'"),
        (["Q", "R"], ["a"], ValueError, r"answers must have one entry per question \(2\), got 1"),
        (["Q", 3], ["a", "b"], TypeError, r"questions\[1\] must be a string, got int"),
        (["Q", "Q<extra_0>"], ["a", "b"], ValueError, r"answers\[1\]: .*must not contain the step token"),
        (
            ["Q", "Q"],
            ["a", "x" * 600],
            ValueError,
            r"answers\[1\] .* fit into the PRM's 512 positions, got \d{3} tokens",
        ),
    ],
)
def test_judge_names_the_bad_row(
    loaded: dict[str, Loaded], questions: Any, answers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loaded["qwen"].prm.judge(questions, answers)


def test_the_last_position_can_be_used(loaded: dict[str, Loaded]) -> None:
    prm = loaded["qwen"].prm
    room = 512 - len(prm.adapter.encode(prm.tokenizer, "Q", []).token_ids)
    assert len(prm.judge(["Q"], ["x" * room])[0].scores) == 1
    with pytest.raises(ValueError, match=r"512 positions, got 513 tokens"):
        prm.judge(["Q"], ["x" * (room + 1)])


def test_score_names_the_bad_row(loaded: dict[str, Loaded]) -> None:
    prm = loaded["qwen"].prm
    with pytest.raises(ValueError, match=r"answers\[1\]\[2\] with its question must fit"):
        prm.score(["Q", "Q"], [["a"], ["b", "c", "x" * 600]])
    with pytest.raises(TypeError, match=r"answers\[0\] must be a sequence of strings, got one string 'abc'"):
        prm.score(["Q"], ["abc"])
    with pytest.raises(ValueError, match="answers must have one entry per question"):
        prm.features(["Q"], [])
    with pytest.raises(ValueError, match=r"questions\[1\] with its question must fit"):
        prm.question_state(["Q", "x" * 600])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": 0}, ValueError, "levels must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating point dtype, got torch.int64"),
        ({"adapter": "prm"}, ValueError, "adapter must be one of .*math-shepherd.*, got 'prm'"),
    ],
)
def test_options_are_checked(
    loaded: dict[str, Loaded], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoPRM.from_pretrained(loaded["qwen"].folder, **options)


def test_an_ordinary_language_model_is_no_prm(tmp_path: Path) -> None:
    folder, *_ = save("shepherd", tmp_path / "mistral")
    with pytest.raises(PRMError, match=r"no PRM adapter matches.*MistralForCausalLM.*adapter="):
        AutoPRM.from_pretrained(folder)
    assert AutoPRM.from_pretrained(folder, adapter="math-shepherd").adapter.name == "math-shepherd"
    assert AutoPRM.from_pretrained(folder, adapter=MathShepherd("\n")).adapter.separator == "\n"


def test_a_named_adapter_overrides_the_config(loaded: dict[str, Loaded]) -> None:
    config = loaded["qwen"].prm.model.config
    assert AutoPRM.adapter(config).name == "qwen2.5-math-prm"
    assert AutoPRM.adapter(config, choice="pqm").name == "pqm"
    assert AutoPRM.adapter(config, {"v_head.summary.weight"}, choice="reasoneval").name == "reasoneval"


def test_the_released_reading_is_an_adapter_with_an_option(loaded: dict[str, Loaded]) -> None:
    one = loaded["reasoneval"]
    released = AutoPRM.from_pretrained(one.folder, dtype=torch.float64, adapter=ReasonEval("released"))
    chain = released.adapter.encode(one.tokenizer, "Q", ["a b", "c d"])
    with torch.no_grad():
        logits = one.model(torch.tensor([chain.token_ids]))[0]
    expected = (
        logits[[position - 1 for position in one.prm.adapter.encode(one.tokenizer, "Q", ["a b", "c d"]).step_positions]]
        .softmax(-1)[:, 1:]
        .sum(-1)
    )
    assert released.score(["Q"], [["a b\n\nc d"]])[0][0] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_checkpoint_without_its_head_is_an_error(loaded: dict[str, Loaded], tmp_path: Path) -> None:
    model, tokenizer = make("qwen")
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PRMError, match=r"no PRM adapter matches architectures \['Qwen2Model'\]"):
        AutoPRM.from_pretrained(tmp_path)
    with pytest.raises(PRMError, match=r"ProcessRewardHead needs the tensor 'score.0.weight'"):
        AutoPRM.from_pretrained(tmp_path, adapter="qwen2.5-math-prm")


def test_a_checkpoint_without_its_backbone_is_an_error(tmp_path: Path) -> None:
    folder, *_ = save("qwen", tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    kept = {name: t for name, t in load_file(folder / "model.safetensors").items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PRMError, match=r"does not have 3 tensors of a Qwen2Model \(layers.1.mlp"):
        AutoPRM.from_pretrained(folder)


def test_a_folder_without_weights_is_an_error(loaded: dict[str, Loaded], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((loaded["qwen"].folder / "config.json").read_text())
    with pytest.raises(PRMError, match=r"has no weights: model.safetensors or pytorch_model.bin"):
        AutoPRM.from_pretrained(tmp_path)


def test_another_models_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder, *_ = save("qwen", tmp_path / "mixed")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    make("pqm")[1].save_pretrained(folder)
    from safetensors.torch import load_file, save_file

    head = {name: t for name, t in load_file(folder / "model.safetensors").items() if name.startswith("score")}
    save_file(head, folder / "model.safetensors", metadata={"format": "pt"})  # said before the backbone is read
    with pytest.raises(PRMError, match=r"tokenizer must have '<\|im_start\|>' as one token"):
        AutoPRM.from_pretrained(folder)


class LinePRM(PRMAdapter):
    """The example of the package's docstring."""

    name = "line-prm"
    architectures = ("LineForProcessReward",)

    def head(self, config: Any, tokenizer: Any = None) -> ValueHead:
        return ValueHead(config.hidden_size)

    def step_token(self, tokenizer: Any) -> str:
        return "[PRM]"

    def text(self, question: str, steps: Any) -> str:
        return f"{question}\n" + "".join(f"{step}[PRM]" for step in steps or [""])


def test_an_adapter_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoPRM, "_adapters", list(AutoPRM._adapters))
    folder, model, tokenizer = save("pqm", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LineForProcessReward"]}))
    assert AutoPRM.from_pretrained(folder).adapter.name == "pqm"
    AutoPRM.register(LinePRM())
    prm = AutoPRM.from_pretrained(folder, dtype=torch.float64)
    assert prm.adapter.name == "line-prm"
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer("Q\na[PRM]")["input_ids"]]))[0, -1, 0].sigmoid().item()
    assert prm.score(["Q"], [["a"]]) == [[[pytest.approx(expected, abs=1e-6)]]]
    with pytest.raises(ValueError, match=r"adapter.name must be new, got 'line-prm'"):
        AutoPRM.register(LinePRM())
    with pytest.raises(TypeError, match="adapter must be a PRMAdapter instance"):
        AutoPRM.register(LinePRM)
    with pytest.raises(TypeError, match="AutoPRM is not instantiated"):
        AutoPRM()
