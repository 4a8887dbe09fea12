"""Where answers are cut: the pieces are the answer, and the tiny world's own steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmfast.pipeline import SplitAfter
from prmfast.pipeline.steps import cut, prefixes
from prmfast.tiny import TinyWorld, task

TEXTS = st.text(st.sampled_from("ab \n;"), max_size=30)


@given(TEXTS, st.sampled_from(["\n\n", ";", "\n"]))
def test_pieces_are_the_answer_and_none_is_blank(text: str, separator: str) -> None:
    pieces = SplitAfter(separator)(text)
    assert "".join(pieces) == (text if text.strip() else "")
    assert all(piece.strip() for piece in pieces)
    assert cut(SplitAfter(separator), text) == pieces
    if pieces:
        assert prefixes(pieces)[-1] == text


@given(st.text(st.sampled_from("ab \n"), max_size=30))
def test_blank_lines_give_the_steps_of_the_released_templates(text: str) -> None:
    wanted = [part.strip() for part in text.split("\n\n") if part.strip()]
    assert [piece.strip() for piece in SplitAfter()(text)] == wanted


def test_steps_of_the_tiny_world(world: TinyWorld) -> None:
    questions = world.questions(20, seed=3)
    for completion in world.engine.sample(questions, list(range(20))):
        pieces = SplitAfter(";")(completion.text)
        assert [piece.strip() for piece in pieces] == task.split_steps(completion.text)
    for odd in ("1 ; 2 ;", "5 ; ; # 5", "; 1", "# 5"):  # a policy may write them
        assert [piece.strip() for piece in SplitAfter(";")(odd)] == task.split_steps(odd)


def test_errors() -> None:
    with pytest.raises(ValueError, match="separator must not be empty"):
        SplitAfter("")
    with pytest.raises(TypeError, match="separator must be a string, got int"):
        SplitAfter(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"consecutive pieces, got \['a', 'b'\] for 'a\\n\\nb'"):
        cut(lambda text: text.split("\n\n"), "a\n\nb")
