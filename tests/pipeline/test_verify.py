"""Verdicts of math-verify, from any thread, with an end to every answer."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from prmfast.pipeline import MathVerifier

REFERENCES = {
    "half": "\\frac{1}{2}",
    "square": "$x^2 + 2x + 1$",
    "answer": "42",
    "pair": "(3, \\frac{\\pi}{2})",
    "boxed": "\\boxed{7}",
    "nothing": "",
}
installed = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


@pytest.fixture(scope="module")
def verify() -> Iterator[MathVerifier]:
    verifier = MathVerifier(REFERENCES)
    yield verifier
    verifier.close()


@installed
@pytest.mark.parametrize(
    ("question", "completion", "right"),
    [
        ("half", "So it is $\\frac{2}{4}$.", True),
        ("half", "The answer is 0.5", True),
        ("half", "Hence \\boxed{\\frac12}", True),
        ("half", "First $\\frac{1}{2}$, but then \\boxed{\\frac{1}{3}}", False),
        ("square", "We get $(x+1)^2$", True),
        ("square", "We get $(x-1)^2$", False),
        ("answer", "Step one.\n\nStep two.\n\nThe answer is $42$.", True),
        ("answer", "The answer is 41", False),
        ("answer", "no number at all", False),
        ("answer", "", False),
        ("pair", "so \\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", True),
        ("boxed", "it is 7", True),
    ],
)
def test_verdicts(verify: MathVerifier, question: str, completion: str, right: bool) -> None:
    assert verify(question, completion) is right


@installed
def test_any_thread_may_ask_and_no_alarm_is_touched(verify: MathVerifier) -> None:
    verdicts: list[bool] = []
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.alarm(1000)
        threads = [
            threading.Thread(target=lambda text=text: verdicts.append(verify("answer", text)))
            for text in ["$42$", "$43$"] * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(verdicts) == [False] * 3 + [True] * 3
        assert signal.alarm(0) > 900
    finally:
        signal.signal(signal.SIGALRM, before)


@installed
def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged() -> None:
    verify = MathVerifier(REFERENCES, timeout=1)
    assert verify("answer", "$42$")
    assert not verify("answer", "$9^{9^{9^{9}}}$")  # math-verify ends this one itself
    first = verify._process
    assert first is not None
    assert verify("answer", "$42$")
    os.kill(first._worker.pid, signal.SIGSTOP)  # as deaf to alarms as a C library in one long call
    assert not verify("answer", "$42$")
    assert first._worker.poll() == -signal.SIGKILL
    assert verify("answer", "$42$")
    second = verify._process
    assert second is not None
    second._worker.kill()  # by the system, short of memory, say
    assert verify("answer", "$42$")
    assert verify._process is not second
    verify.close()


@installed
def test_a_fork_has_a_process_of_its_own(verify: MathVerifier) -> None:
    assert verify("answer", "$42$")
    child = os.fork()
    if child == 0:
        os._exit(0 if verify("answer", "$42$") and not verify("half", "$42$") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verify("half", "$1/2$")


@installed
def test_it_can_be_pickled_and_names_what_it_compares_with(verify: MathVerifier) -> None:
    again: MathVerifier = pickle.loads(pickle.dumps(verify))
    assert again.references == REFERENCES
    assert again.verifier_id == verify.verifier_id
    assert verify.verifier_id.startswith("math-verify 0.")
    assert MathVerifier({"a": "1"}).verifier_id != MathVerifier({"a": "2"}).verifier_id


@installed
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: v("unknown", "1"), KeyError, "references must hold every question, got none for 'unknown'"),
        (lambda v: v("nothing", "1"), ValueError, "must hold an expression that math-verify can parse, got ''"),
        (lambda v: MathVerifier([("a", "1")]), TypeError, "references must map questions to answers, got list"),
        (lambda v: MathVerifier({"a": 1}), TypeError, r"references\['a'\] must be a string, got int"),
        (lambda v: MathVerifier({}, timeout=0), ValueError, "timeout must be at least 1 second, got 0"),
        (lambda v: MathVerifier({}, timeout=0.5), TypeError, "timeout must be a whole number of seconds, got float"),
    ],
)
def test_errors(verify: MathVerifier, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(verify)


def test_without_math_verify_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else found(name))
    with pytest.raises(ImportError, match=r'pip install "prmfast\[verify\]"'):
        MathVerifier(REFERENCES)
