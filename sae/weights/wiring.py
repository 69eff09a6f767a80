"""Which parts write a latent and which read it, by weights and on prompts side by side, and how far that agrees.

By weights: how far a part's output lies along the latent's encoder row, or its input along the decoder row. On prompts:
what it adds to the pre-activation where the behaviour is due less where it is not, or how much it changes when it alone
is not shown the latent. Weights also see parts that are idle on these prompts; prompts see what is done.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae import stats
from sae.behavior.measure import Prompts
from sae.lm.matrices import Part
from sae.weights.latent_data import check_by_ablation, contributions, read_effects
from sae.weights.latents import Agreement, Singular, agreement, parts_of, read_scores, singular_writers, write_scores
from sae.weights.stream import open_stream

Array = np.ndarray


class Side(NamedTuple):
    """The parts on one side of a latent.

    Attributes:
        parts: all heads and neurons before it, or behind it.
        energy: by weights; see `sae.weights.latents`. 1 on average for a random direction.
        p: share of the null's directions with at least that energy.
        data: on prompts; of writers in units of the pre-activation, of readers the length of the change.
    """

    parts: list[Part]
    energy: Float[Array, " part"]
    p: Float[Array, " part"]
    data: Float[Array, " part"]

    def strongest(self, n: int) -> list[int]:
        """Indices of the `n` parts of largest absolute `data`."""
        found: list[int] = np.argsort(-np.abs(self.data), kind="stable")[:n].tolist()
        return found

    def agreement(self, planted: Sequence[bool] | None = None, seed: int = 0) -> Agreement:
        """The ranking by weights beside that by data, and both beside what is known to be planted."""
        return agreement(self.energy, np.abs(self.data), planted, seed)


class Wiring(NamedTuple):
    """A latent's writers and readers.

    Attributes:
        latent: which.
        writers, readers: parts before and behind it; readers are none where nothing is behind.
        singular: the singular directions that can write most of it.
        contrast: what the writers' contributions, the embeddings' too, add up to: mean pre-activation on positives less
            on negatives.
        embed: the embeddings' share of that.
        gap: largest difference between a pre-activation and what its parts add up to.
        ablated: of the strongest writers by label, how far `contrast` falls when the part gives its mean at every
            token. What goes through later parts is in it; if nothing did, it would be the part's `data`.
    """

    latent: int
    writers: Side
    readers: Side
    singular: list[Singular]
    contrast: float
    embed: float
    gap: float
    ablated: dict[str, float]


class LocatedAgreement(NamedTuple):
    """The parts of a latent beside parts located for the behaviour without it.

    Attributes:
        n: parts that both rank.
        rank: rank correlation of the two scores.
        k: how many of the best of each are compared.
        shared: of these, in both.
        p: of so many by chance (hypergeometric tail).
    """

    n: int
    rank: stats.Correlation
    k: int
    shared: int
    p: float


def wire(
    lm: Any,
    encoder: Any,
    latent: int,
    prompts: Prompts,
    *,
    position: int = -1,
    n_ablated: int = 10,
    null: str = "random",
    n_null: int = 1000,
    seed: int = 0,
) -> Wiring:
    """Find a latent's writers and readers.

    Args:
        lm: the model.
        encoder: an SAE in the residual stream.
        latent: which.
        prompts: of both labels, from `sae.behavior.measure.prepare`.
        position: the token whose pre-activation is taken apart, from the prompt's end.
        n_ablated: how many of the strongest writers are ablated as well; a forward over the prompts each.
        null: "random" directions or other "latents", `n_null` of them.
        n_null: see `null`.
        seed: of the null's choice.

    Raises:
        UserError: an SAE elsewhere than in the stream, or one that normalises every token by itself.
    """
    stream, parts = open_stream(lm), parts_of(lm)
    labels = np.array([bool(record.label) for record in prompts.records])
    written = write_scores(lm, stream, encoder, latent, parts, null=null, n_null=n_null, seed=seed)
    given = contributions(lm, stream, encoder, latent, parts, prompts, position)
    writers = Side(written.parts, written.energy, written.p, given.contrast(labels.tolist()))
    read = read_scores(lm, stream, encoder, latent, parts, null=null, n_null=n_null, seed=seed)
    behind, changes = read_effects(lm, stream, encoder, latent, parts, prompts)
    assert [part.label for part in behind] == [part.label for part in read.parts]
    best = [writers.parts[index] for index in writers.strongest(n_ablated)]
    checked = check_by_ablation(lm, stream, encoder, latent, best, prompts, position)
    return Wiring(
        latent,
        writers,
        Side(read.parts, read.energy, read.p, changes),
        singular_writers(lm, stream, encoder, latent),
        _difference(given.pre_acts, labels),
        _difference(given.embed, labels),
        given.gap,
        {part.label: _difference(falls, labels) for part, falls in zip(checked.parts, checked.falls.T, strict=True)},
    )


def _difference(values: Array, labels: Array) -> float:
    return float(values[labels].mean() - values[~labels].mean())


def beside_located(side: Side, located: Mapping[str, float], k: int = 10) -> LocatedAgreement | None:
    """Set a latent's parts beside scores of parts that were located by other means.

    Args:
        side: writers or readers.
        located: scores by the parts' labels, larger = more the behaviour's.
        k: how many of the best to compare.

    Returns:
        None where they have fewer than three parts in common.
    """
    both = [index for index, part in enumerate(side.parts) if part.label in located]
    if len(both) < 3:
        return None
    own = np.abs(side.data[both])
    other = np.array([located[side.parts[index].label] for index in both])
    k = min(k, len(both) // 2)
    first, second = (set(np.argsort(-scores, kind="stable")[:k].tolist()) for scores in (own, other))
    shared = len(first & second)
    return LocatedAgreement(len(both), stats.spearman(own, other), k, shared, stats.overlap_p(shared, k, k, len(both)))
