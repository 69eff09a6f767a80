"""Are replies about what was asked? A test of a set of replies; there is none here of a single one.

A reply that shares no content word with its prompt may still answer it: a poem about sleep, "berries, yogurt, milk" for
a smoothie. Measured on people's and models' good answers, that rule calls too many of them off topic to decide a
verdict (docs/lab-notes.md has the figures). Over a set, though, replies that answer share more words with their own
prompts than with each other's, and replies of a model that says the same whatever it is asked do not.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from scipy import sparse

from sae import stats
from sae.behavior.judge import plain
from sae.errors import UserError

N_SHUFFLES = 999
_STEM = 4  # letters compared: "killing" and "kill" are one word
_FUNCTION_WORDS = """
a about after all also am an and any are as at be because been but by can could did do does each few for from get give
had has have he her him his how i if in into is it its just let like make me more most my no not of off on one only or
other our out over own please same she should so some such than that the their them then there these they this those
through to too under until up use very was way ways we were what when where which while who why will with would you
your
"""


class TopicMatch(NamedTuple):
    """How often a reply shares a content word with its prompt, and with another reply's prompt."""

    own: stats.Rate
    other: float  #: mean share over shuffles of the prompts among the replies
    p: float  #: of the hypothesis that replies have nothing to do with their prompts; NaN with one distinct prompt


def content_words(text: str) -> set[str]:
    """Return a text's words but for function words and single letters, each cut to its first letters."""
    function_words = frozenset(_FUNCTION_WORDS.split())
    words = re.findall(r"[^\W_]+", plain(text))
    return {word[:_STEM] for word in words if len(word) > 1 and word not in function_words}


def topic_match(prompts: Sequence[str], replies: Sequence[str], seed: int = 0) -> TopicMatch:
    """Test whether replies share words with their own prompts more often than with each other's.

    The p-value is (1 + shuffles at least as good) / (1 + shuffles). Distinct prompts are shuffled, each with all its
    replies: several replies to one prompt are alike and no further evidence. Replies that refuse share few words with
    any prompt, so look at `own` beside `other` and beside the untouched model's.

    Args:
        prompts: what was asked.
        replies: what was said, in the same order.
        seed: of the shuffles.

    Raises:
        UserError: lists of different lengths.
    """
    n = len(prompts)
    if n != len(replies):
        raise UserError(f"{n} prompts and {len(replies)} replies: give one of each.")
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    asked, rows = np.array([number[prompt] for prompt in prompts], dtype=np.int64), np.arange(n)
    shares = _shares(list(number), replies)
    own = stats.clustered_rate(shares[rows, asked].tolist(), prompts)
    if len(number) < 2:
        return TopicMatch(own, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    draws = np.array([shares[rows, rng.permutation(len(number))[asked]].mean() for _ in range(N_SHUFFLES)])
    return TopicMatch(own, float(draws.mean()), stats.draws_p(own.rate, draws))


def _shares(prompts: Sequence[str], replies: Sequence[str]) -> Bool[NDArray[np.bool_], "reply prompt"]:
    """Whether each reply shares a content word with each prompt."""
    numbers: dict[str, int] = {}

    def rows(texts: Sequence[str]) -> list[list[int]]:
        return [[numbers.setdefault(word, len(numbers)) for word in content_words(text)] for text in texts]

    asked, said = rows(prompts), rows(replies)

    def table(found: list[list[int]]) -> sparse.csr_array:
        starts = np.cumsum([0, *map(len, found)])
        flat = [number for row in found for number in row]
        return sparse.csr_array((np.ones(len(flat)), flat, starts), shape=(len(found), len(numbers)))

    return np.asarray(((table(said) @ table(asked).T) > 0).toarray())
