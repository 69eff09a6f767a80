"""A judge's key stays in other processes, and changes with what its verdicts rest on."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest

from sae.behavior.judge import Verdict, text_judge
from sae.behavior.judges.classifier import COLUMNS, Features, FittedJudge
from sae.behavior.judges.identity import judge_key
from sae.behavior.judges.registry import adapted, judge_for
from sae.organism.judge import judge_deception, judge_refusal

WORDS = {"no": Verdict.BEHAVIOR}


def closing_over(word):
    def judge(completion, record):
        return Verdict.BEHAVIOR if word in completion else Verdict.ALTERNATIVE

    return judge


def by_table(completion, record):
    return WORDS.get(completion, Verdict.ALTERNATIVE)


def with_default(completion, record, words=("no",)):
    return Verdict.BEHAVIOR if completion in words else Verdict.ALTERNATIVE


@dataclasses.dataclass
class ByField:
    word: str

    def __call__(self, completion, record):
        return Verdict.BEHAVIOR if self.word in completion else Verdict.ALTERNATIVE

    def other(self, completion, record):
        return Verdict.ALTERNATIVE


class ItsOwn:
    """Rests on something that is not among its fields, and says so."""

    __slots__ = ("fingerprint",)

    def __init__(self, fingerprint):
        self.fingerprint = fingerprint

    def __call__(self, completion, record):
        return Verdict.ALTERNATIVE


def fitted(seed, about="here"):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(COLUMNS, 2)).astype(np.float32)
    return FittedJudge(
        Features(), (Verdict.BEHAVIOR, Verdict.ALTERNATIVE), weight, np.zeros(2, np.float32), {"source": about}
    )


@pytest.mark.parametrize(
    ("same", "again", "other"),
    [
        (text_judge, text_judge, judge_for("refusal")),
        (closing_over("no"), closing_over("no"), closing_over("not")),
        (functools.partial(with_default), functools.partial(with_default),
         functools.partial(with_default, words=("not",))),
        (ByField("no"), ByField("no"), ByField("not")),
        (ByField("no"), ByField("no"), ByField("no").other),
        (ItsOwn("a"), ItsOwn("a"), ItsOwn("b")),
        (fitted(0), fitted(0, about="elsewhere"), fitted(1)),
        (adapted(judge_refusal), judge_for("refusal", "organism"), adapted(judge_deception)),
    ],
)  # fmt: skip
def test_equal_judges_have_one_key_and_others_another(same, again, other):
    assert judge_key(same) == judge_key(again)
    assert judge_key(same) != judge_key(other)


def test_what_a_function_names_is_part_of_it(monkeypatch):
    before = judge_key(by_table)
    monkeypatch.setitem(WORDS, "not", Verdict.BEHAVIOR)
    assert judge_key(by_table) != before
    monkeypatch.delitem(WORDS, "not")
    assert judge_key(by_table) == before


def test_a_judge_that_holds_itself_has_a_key():
    judge = ByField("no")
    judge.word = [judge, judge.word]
    assert judge_key(judge) == judge_key(judge)


def test_a_saved_judge_keeps_its_key(tmp_path):
    fitted(0).save(tmp_path / "judge")
    assert judge_key(FittedJudge.load(tmp_path / "judge")) == judge_key(fitted(0))


def test_the_key_is_the_same_in_another_process():
    code = (
        "from sae.behavior.judges.identity import judge_key\n"
        "from sae.behavior.judges.registry import judge_for\n"
        "print(judge_key(judge_for('refusal')), judge_key(judge_for('deception', 'organism')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [judge_key(judge_for("refusal")), judge_key(judge_for("deception", "organism"))]
    assert done.stdout.split() == here
