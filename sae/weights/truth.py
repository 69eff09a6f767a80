"""Scoring a ranking of parts or weights against what was planted in the model organism.

A part is *positive* for a behaviour if setting it back to its stage-one value makes the behaviour's margin fall by more
than `threshold` of that margin (`sae.organism.truth` measured it). What lies outside the planted blocks is negative by
construction. Single weights are scored on the stratified sample alone, nine tenths of which lie in planted blocks: its
base rate is far above the model's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from sae import stats
from sae.errors import unknown
from sae.lm.matrices import Part
from sae.organism.truth import Truth
from sae.weights.attribution import Scores

Array = np.ndarray
THRESHOLD = 1e-3


class Score(NamedTuple):
    """How well a ranking finds a behaviour's planted parts.

    Attributes:
        auroc: chance that a positive is ranked above a negative; None where there is no positive.
        auprc: mean precision over the positives, best first; ties are in expectation.
        base_rate: share of positives: the AUPRC of chance.
        located: share of positives among the top n, n their number.
        decoy_share: among these, the share positive for another planted behaviour only.
        n_positive, n: positives, and all that was ranked.
    """

    auroc: float | None
    auprc: float | None
    base_rate: float
    located: float | None
    decoy_share: float | None
    n_positive: int
    n: int


def effects_of(truth: Truth, parts: Sequence[Part]) -> Float[Array, "part behavior"]:
    """Return each part's measured effect on every behaviour's margin; zero outside the planted blocks.

    Raises:
        UserError: parts of a level that was not measured.
    """
    tables = {"head": truth.head_effects.numpy(), "neuron": truth.neuron_effects.numpy()}
    pieces = _pieces(truth)
    found = np.zeros((len(parts), len(truth.layout.behaviors)))
    for index, part in enumerate(parts):
        if part.level in tables:
            found[index] = tables[part.level][part.layer, part.number]
            continue
        if not pieces.get(part.level):
            raise unknown("level with planted truth", part.level, [*tables, *(name for name in pieces if pieces[name])])
        if part.slices[0].name in pieces[part.level]:
            own = pieces[part.level][part.slices[0].name]
            found[index] = (own if part.level == "tensor" else own[part.number]).numpy()
    return found


def is_measured(truth: Truth, level: str) -> bool:
    """Tell whether the effects of a level's parts were measured; blocks' never are, old organisms lack some."""
    return level in ("parameter", "head", "neuron") or bool(_pieces(truth).get(level))


def _pieces(truth: Truth) -> dict[str, dict[str, Tensor]]:
    """What was measured of single matrices, by level and matrix."""
    return {"row": truth.row_effects, "column": truth.column_effects, "tensor": truth.tensor_effects}


def sampled(truth: Truth, scores: Scores) -> Float[Array, " sample"]:
    """Return the scores of the sample's single weights, which `truth.sample_effects` are about."""
    return np.array([float(scores[one.weight][one.row, one.column]) for one in truth.sample])


def positives(
    effects: Float[Array, "part behavior"], truth: Truth, threshold: float = THRESHOLD
) -> Bool[Array, "part behavior"]:
    """Tell which parts are positive for which behaviour."""
    found: Array = effects > threshold * truth.margins.numpy()
    return found


def score(
    scores: Float[Array, " part"],
    effects: Float[Array, "part behavior"],
    truth: Truth,
    behavior: str,
    threshold: float = THRESHOLD,
) -> Score:
    """Score a ranking.

    Args:
        scores: larger = more the behaviour's.
        effects: of the same parts, as `effects_of` or `truth.sample_effects` give them.
        truth: of the organism.
        behavior: which one was looked for.
        threshold: what counts as an effect, as a share of the behaviour's margin.

    Raises:
        UserError: a behaviour that was not planted.
    """
    if behavior not in truth.layout.behaviors:
        raise unknown("planted behavior", behavior, list(truth.layout.behaviors))
    flags = positives(effects, truth, threshold)
    own = flags[:, truth.layout.behaviors.index(behavior)]
    n = int(own.sum())
    if n in (0, len(own)):
        return Score(None, None, float(own.mean()), None, None, n, len(own))
    decoy = flags.any(axis=1) & ~own
    top = np.argsort(-scores, kind="stable")[:n]
    return Score(
        float(stats.auroc(scores, own)[0]),
        stats.average_precision(scores, own),
        float(own.mean()),
        float(own[top].mean()),
        float(decoy[top].mean()),
        n,
        len(own),
    )
