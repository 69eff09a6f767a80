"""A small linear judge: the words of a reply, hashed, weighed and summed, beside what its opening says.

    judge = fit_judge(texts, labels, prompts)      # sae.behavior.judges.fitting, on your own labelled completions
    judge.save("my-judge")
    register_judge("refusal", FittedJudge.load("my-judge"))

A text's features are which word n-grams its first words hold, each hashed to one of `DIMS` columns, scaled to norm 1,
and one column that says whether its opening refuses (`substring.opening_refuses`). A softmax over the classes reads
them. Without that column a judge learns one model's way to refuse, and takes all of another's refusals for answers.

No weights ship with the package: docs/judges.md says why.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import sparse, special

from sae.behavior.contrast import ContrastRecord
from sae.behavior.judge import Verdict, is_degenerate, plain
from sae.behavior.judges.substring import opening_refuses
from sae.errors import UserError
from sae.files import atomic_folder, read_json, read_tensors, sha256_file, sha256_json, write_json, write_tensors

DIMS = 2**13
COLUMNS = DIMS + 1
"""The last says whether the opening refuses."""
WEIGHTS_FILE, ABOUT_FILE = "judge.safetensors", "judge.json"
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_DIGEST = 12  # hex digits kept of a text's SHA-256: enough to tell some thousand texts apart


class Features(NamedTuple):
    """What a fitted judge looks at, and how strongly its weights are held back."""

    words: int = 40
    """Words looked at, from the beginning; 0 looks at all."""
    order: int = 2
    """The longest n-gram, in words and punctuation marks."""
    l2: float = 0.1
    """Penalty: the loss is summed over texts, plus l2 / 2 times the squared weights."""


def features_of(texts: Sequence[str], features: Features) -> sparse.csr_array:
    """Return the texts' n-grams as sparse rows [n COLUMNS], of norm 1 but for the last column, which is 0 or 1."""
    columns: list[int] = []
    values: list[float] = []
    starts = [0]
    for text in texts:
        words = ["^", *_WORD.findall(plain(text))]  # "^": what a reply begins with counts apart
        words = words[: features.words + 1] if features.words else words
        found = {
            zlib.crc32(" ".join(words[start : start + size]).encode()) % DIMS
            for size in range(1, features.order + 1)
            for start in range(len(words) - size + 1)
            if words[start : start + size] != ["^"]
        }
        columns += sorted(found)
        values += [1 / math.sqrt(len(found))] * len(found) if found else []
        if opening_refuses(text):
            columns.append(DIMS)
            values.append(1.0)
        starts.append(len(columns))
    return sparse.csr_array((values, columns, starts), shape=(len(texts), COLUMNS))


def digest(text: str) -> str:
    """Return what identifies a text that a judge was fitted on."""
    return hashlib.sha256(plain(text).encode()).hexdigest()[:_DIGEST]


@dataclass(frozen=True, eq=False)
class FittedJudge:
    """A judge with weights; itself a `Judge`.

    Attributes:
        features: what it looks at.
        classes: the verdicts it tells apart. Broken text is DEGENERATE before it is asked.
        weight: [COLUMNS n_classes].
        bias: [n_classes].
        about: where the texts it was fitted on come from, and their licence.
        digests: of those texts, so that nobody measures it on them by mistake.
    """

    features: Features
    classes: tuple[Verdict, ...]
    weight: Float[NDArray[np.float32], "columns n_classes"]
    bias: Float[NDArray[np.float32], " n_classes"]
    about: Mapping[str, Any] = field(default_factory=dict)
    digests: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """Return a hash of what its verdicts rest on; where it was fitted is no part of it."""
        weights = [hashlib.sha256(array.tobytes()).hexdigest() for array in (self.weight, self.bias)]
        return sha256_json([self.features, self.classes, weights])

    def probabilities(self, texts: Sequence[str]) -> Float[NDArray[np.float64], "n n_classes"]:
        """Return each text's probability of each class, in the order of `classes`."""
        scores = features_of(texts, self.features) @ self.weight.astype(np.float64) + self.bias
        return np.asarray(special.softmax(scores, axis=1))

    def __call__(self, completion: str, record: ContrastRecord) -> Verdict:
        """Judge a completion; the record is not used."""
        if is_degenerate(completion):
            return Verdict.DEGENERATE
        return self.classes[int(self.probabilities([completion]).argmax())]

    def knows(self, texts: Iterable[str]) -> list[bool]:
        """Tell of each text whether the judge was fitted on it: its agreement there means nothing."""
        return [digest(text) in self.digests for text in texts]

    def save(self, folder: Path | str) -> None:
        """Write the judge as a folder of safetensors and JSON, all or nothing."""
        import torch

        with atomic_folder(folder) as new:
            tensors = {"weight": torch.from_numpy(self.weight), "bias": torch.from_numpy(self.bias)}
            write_tensors(new / WEIGHTS_FILE, tensors)
            record = {
                "schema_version": 1,
                "features": self.features,
                "classes": self.classes,
                "about": dict(self.about),
                "sha256": sha256_file(new / WEIGHTS_FILE),
                "digests": sorted(self.digests),
            }
            write_json(new / ABOUT_FILE, record)

    @classmethod
    def load(cls, folder: Path | str) -> "FittedJudge":
        """Read a saved judge.

        Raises:
            UserError: files that are missing, or not those of one judge.
        """
        folder = Path(folder)
        record = read_json(folder / ABOUT_FILE)
        tensors = read_tensors(folder / WEIGHTS_FILE)
        try:
            features = Features(**record["features"])
            classes = tuple(Verdict(name) for name in record["classes"])
            weight, bias = tensors["weight"].numpy(), tensors["bias"].numpy()
            fits = weight.shape == (COLUMNS, len(classes)) and bias.shape == (len(classes),)
            whole = fits and record["sha256"] == sha256_file(folder / WEIGHTS_FILE)
            about, digests = dict(record["about"]), frozenset(record["digests"])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(
                f"{str(folder)!r} holds no judge, or {ABOUT_FILE} and {WEIGHTS_FILE} of different ones: save it again."
            )
        return cls(features, classes, weight, bias, about, digests)
