"""k-sparse probing (Gurnee et al. 2305.01610): how well k latents tell a concept apart, for any labelled rows.

    found = k_sparse_probing(sae.encode(acts), labels, topics, acts=acts)
    found.sparse[0].score.auroc, found.dense.auroc      # the best latent, and a probe on the raw activations

1. Whole groups (topics) go to the train or the test side, so that rows on one topic are never on both.
2. The k latents with the largest |mean over positives - mean over negatives| on train rows are chosen.
3. A logistic regression on them (standardised on train rows; classes weighted equally; L2) is fitted on train rows.
4. Accuracy, AUROC and F1 on test rows, with bootstrap intervals over groups.

Beside it: the same regression on all coordinates of the raw activations; k random latents that fire about as often as
the chosen; and the whole procedure, choice included, on shuffled labels.

Sources: SAEBench's sparse probing and sae-probes (2502.16681) choose latents in this way. They draw train and test rows
at random; splitting by group and the two controls are added here. sae-probes divides latents by their mean non-zero
activation before choosing; here the difference is in the latents' own units. So with decoder rows that are not of
length 1 (some foreign SAEs), multiply activations by the norms of the rows first.

Traps. Accuracy of a rare class is high for a probe that always says no: compare it with `majority`, and mind that
equal weights trade some of it for recall. Latents chosen on few groups fit these groups: the shuffled draws show how
well. An interval is about the groups of the test side, for this one split and this one choice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from sae import stats
from sae.errors import UserError
from sae.probe import fit_probe
from sae.stats import Interval

Array = np.ndarray

LatentActs = Tensor | Callable[[], Iterable[Tensor]]
"""[n d_sae], or a function that gives its rows batch by batch, in the same order each time it is called."""

NEIGHBORS = 50
"""Latents of nearest density that a random one is drawn from."""
N_CONTROLS = 20
"""Draws of each control, unless told otherwise."""


class Score(NamedTuple):
    """Quality on test rows, with 95% bootstrap intervals over groups."""

    accuracy: Interval
    auroc: Interval
    f1: Interval
    """Of the positive class: 2 TP / (2 TP + FP + FN)."""


class Spread(NamedTuple):
    """A number over control draws: its mean, and the 2.5th and 97.5th percentile. NaN without draws."""

    mean: float
    low: float
    high: float
    n_draws: int


class Control(NamedTuple):
    """What draws of a control scored on the same test rows."""

    accuracy: Spread
    auroc: Spread
    f1: Spread


class SparseProbe(NamedTuple):
    """A probe on k latents."""

    k: int
    latents: list[int]
    """The chosen, best first."""
    score: Score
    random: Control
    """k random latents each, matched one to one to the chosen in density."""
    shuffled: Control
    """Chosen, fitted and scored on labels that are shuffled within each side, topic by topic."""


class ProbingResult(NamedTuple):
    """k-sparse probing of one label."""

    sparse: list[SparseProbe]
    """One for each k, in the order given."""
    dense: Score | None
    """The probe on raw activations; None where none were given."""
    majority: float
    """Share of the commoner class among test rows: the accuracy of saying always the same."""
    n_train: int
    n_test: int
    n_train_groups: int
    n_test_groups: int


class ClassDifference(NamedTuple):
    """Statistics of every latent over some rows, for several labelings at once."""

    difference: Float[Array, "labeling d_sae"]
    """Mean over positives minus mean over negatives."""
    density: Float[Array, " d_sae"]
    """Fraction of the rows on which the latent is not 0."""


def k_sparse_probing(
    latent_acts: LatentActs,
    labels: ArrayLike,
    groups: Sequence[str],
    *,
    ks: Sequence[int] = (1, 2, 5),
    acts: Float[Tensor, "n d_in"] | None = None,
    test: ArrayLike | None = None,
    n_controls: int = N_CONTROLS,
    n_draws: int = 1000,
    l2: float = 1.0,
    seed: int = 0,
) -> ProbingResult:
    """Probe one binary label.

    Args:
        latent_acts: activations of the latents, at once or streamed (it is read twice).
        labels: [n], True for positives.
        groups: [n], what must not be on both sides: the topic, document or template of each row.
        ks: how many latents, a probe each.
        acts: raw activations of the same rows, for the dense probe.
        test: [n], True on the test side; by default `held_out_rows(groups, seed=seed)`.
        n_controls: draws of each control; 0 leaves them out.
        n_draws: bootstrap draws.
        l2: see `fit_probe`.
        seed: of the split, the controls and the bootstrap.

    Raises:
        UserError: a group on both sides, a side with one class only, numbers of rows that disagree, a k that does not
            fit, or activations that are not finite.
    """
    flags, names = np.asarray(labels).astype(bool), np.asarray([str(group) for group in groups])
    held_out = held_out_rows(groups, seed=seed) if test is None else np.asarray(test).astype(bool)
    check_split(flags, names, held_out)
    setting = _Setting(flags, names, held_out, n_draws, l2, seed)
    rng = np.random.default_rng(seed)
    shuffles = [setting.shuffled(int(rng.integers(2**31))) for _ in range(n_controls)]
    found = class_difference(latent_acts, np.stack([flags, *shuffles]), ~held_out)
    check_ks(ks, found.density.size, n_controls)
    best = [np.argsort(-np.abs(row), kind="stable")[: max(ks)] for row in found.difference]
    drawn = [_matched(found.density, best[0], int((~held_out).sum()), rng) for _ in range(n_controls)]
    wanted = np.unique(np.concatenate([*best, *drawn]))
    x = columns(latent_acts, wanted)

    def of(latents: Array, k: int) -> Array:
        return x[:, np.searchsorted(wanted, latents[:k])]

    sparse = [
        SparseProbe(
            k=k,
            latents=best[0][:k].tolist(),
            score=setting.score(of(best[0], k)),
            random=setting.control((of(latents, k), flags) for latents in drawn),
            shuffled=setting.control(
                (of(latents, k), given) for latents, given in zip(best[1:], shuffles, strict=True)
            ),
        )
        for k in ks
    ]
    if acts is not None and len(acts) != len(flags):
        raise UserError(f"{len(acts)} rows of raw activations and {len(flags)} labels: give one label a row.")
    share = float(flags[held_out].mean())
    return ProbingResult(
        sparse=sparse,
        dense=None if acts is None else setting.score(acts.detach().float().cpu().numpy()),
        majority=max(share, 1 - share),
        n_train=int((~held_out).sum()),
        n_test=int(held_out.sum()),
        n_train_groups=len(np.unique(names[~held_out])),
        n_test_groups=len(np.unique(names[held_out])),
    )


class _Setting(NamedTuple):
    """What all probes of a label share: the rows, their sides, and how to fit and score."""

    labels: Bool[Array, " n"]
    groups: Array
    test: Bool[Array, " n"]
    n_draws: int
    l2: float
    seed: int

    def shuffled(self, seed: int) -> Bool[Array, " n"]:
        """Shuffle each side on its own, so that both keep their classes."""
        found = self.labels.copy()
        for side in (self.test, ~self.test):
            found[side] = stats.shuffled(self.labels[side], seed, topics=self.groups[side])
        return found

    def fitted(self, x: Array, labels: Array) -> Float[Array, " test"]:
        """Log-odds of test rows by a probe fitted on the train rows of x [n d]."""
        return fit_probe(x[~self.test], labels[~self.test], self.l2).scores(x[self.test])

    def score(self, x: Array) -> Score:
        """Fit and score a probe on columns x [n d]."""
        scores, labels, groups = self.fitted(x, self.labels), self.labels[self.test], self.groups[self.test]
        clusters, says = groups.tolist(), scores > 0
        # F1 is no mean over rows: each draw counts its own hits and errors.
        rng = np.random.default_rng(self.seed)
        weights = stats.resample_weights(labels.astype(int), groups, self.n_draws, rng)
        hits, wrong = weights @ (says & labels), weights @ (says != labels)
        draws = np.where(hits > 0, 2 * hits / np.maximum(2 * hits + wrong, 1), 0.0)
        low, high = np.quantile(draws, [0.025, 0.975])
        return Score(
            accuracy=stats.bootstrap_mean(says == labels, clusters, self.n_draws, self.seed),
            auroc=stats.auroc_interval(scores, labels, clusters, self.n_draws, self.seed),
            f1=Interval(_point(scores, labels)[2], float(low), float(high), len(labels)),
        )

    def control(self, draws: Iterable[tuple[Array, Array]]) -> Control:
        """Fit and score a probe for every draw of columns [n k] and labels [n]."""
        points = [_point(self.fitted(x, labels), labels[self.test]) for x, labels in draws]
        return Control(*(_spread(column) for column in np.array(points).reshape(-1, 3).T))


def held_out_rows(groups: Sequence[str], share: float = 0.35, seed: int = 0) -> Bool[Array, " n"]:
    """Return which rows are on the test side: about `share` of the groups, by a hash of the group's name."""
    splits = {"train": 1 - share, "test": share}
    side = {name: stats.hash_split(name, splits, salt=f"probing {seed}") for name in {str(group) for group in groups}}
    return np.array([side[str(group)] == "test" for group in groups], dtype=bool)


def check_split(labels: Bool[Array, " n"], groups: Array, test: Bool[Array, " n"]) -> None:
    """Refuse a split that leaks or cannot be learned from.

    Raises:
        UserError: a group on both sides, a side with one class only, or numbers of rows that disagree.
    """
    if not len(labels) == len(groups) == len(test):
        raise UserError(f"{len(labels)} labels, {len(groups)} groups and {len(test)} sides: give one of each a row.")
    both = np.intersect1d(groups[test], groups[~test])
    if len(both):
        raise UserError(
            f"group {str(both[0])!r} (one of {len(both)}) has rows on the train and on the test side: "
            "put each group on one side."
        )
    for side, name in ((~test, "train"), (test, "test")):
        if labels[side].all() or not labels[side].any():
            raise UserError(
                f"the {side.sum()} rows of the {name} side have one class only: "
                "give more groups, another seed, or the sides yourself."
            )


def class_difference(latent_acts: LatentActs, labelings: ArrayLike, rows: ArrayLike) -> ClassDifference:
    """Read the activations once and compare the classes of every labeling.

    Args:
        latent_acts: [n d_sae], or its batches.
        labelings: [labeling n], True for positives; each has both classes among the rows.
        rows: [n], True for the rows that count.
    """
    flags, kept = np.atleast_2d(np.asarray(labelings).astype(bool)), np.asarray(rows).astype(bool)
    sums: Tensor | None = None
    for start, part in batches(latent_acts, len(kept)):
        here = slice(start, start + len(part))
        chosen = torch.from_numpy(kept[here]).to(part.device)
        # One row for each labeling, and one that counts every row.
        weights = torch.from_numpy(np.vstack([flags[:, here], np.ones((1, len(part)), dtype=bool)])).to(part)
        active, fired = part[chosen], (part[chosen] != 0).sum(0)
        if not bool(torch.isfinite(active).all()):
            raise UserError("latent activations hold NaN or infinite values: check the SAE and its input.")
        found = torch.cat([weights[:, chosen] @ active, fired[None].to(part)]).double()
        sums = found if sums is None else sums + found
    assert sums is not None, "_batches gives at least one batch"
    totals = sums.cpu().numpy()
    n, n_pos = int(kept.sum()), flags[:, kept].sum(axis=1)[:, None]
    positive, everything = totals[:-2], totals[-2]
    return ClassDifference(positive / n_pos - (everything - positive) / (n - n_pos), totals[-1] / n)


def columns(latent_acts: LatentActs, latents: ArrayLike) -> Float[Array, "n m"]:
    """Read the activations of some latents; float32, in the order of `latents`."""
    index = torch.as_tensor(np.asarray(latents, dtype=np.int64))
    parts = [part[:, index.to(part.device)].float().cpu() for _, part in batches(latent_acts)]
    return torch.cat(parts).numpy()


def batches(latent_acts: LatentActs, n: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Batches, each with the number of its first row; `n` is how many rows there should be."""
    start = 0
    for part in [latent_acts] if isinstance(latent_acts, Tensor) else latent_acts():
        if n is not None and start + len(part) > n:
            raise UserError(f"more than {n} rows of latent activations, and {n} labels: give one label a row.")
        yield start, part.detach().float()
        start += len(part)
    if start == 0 or n not in (None, start):
        raise UserError(f"{start} rows of latent activations and {n} labels: give one label a row.")


def check_ks(ks: Sequence[int], d_sae: int, n_controls: int = N_CONTROLS) -> None:
    """Refuse numbers of latents that an SAE of `d_sae` has not, or not as many others to draw controls from.

    Raises:
        UserError: naming the largest k that fits.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"ks = {list(ks)} must be one or more numbers of latents, each at least 1.")
    room = d_sae // 2 if n_controls else d_sae
    if max(ks) > room:
        reason = "as many random ones beside them" if n_controls else "no more than there are"
        raise UserError(f"k = {max(ks)} latents of {d_sae}, with {reason}, cannot be: give a k of at most {room}.")


def _matched(density: Array, chosen: Array, n: int, rng: np.random.Generator) -> Array:
    """Draw as many other latents, each from those nearest to the chosen in log density."""
    others = np.setdiff1d(np.arange(density.size), chosen)
    place = np.log(density + 0.5 / n)  # half a firing more, so that silence has a place on the scale, too
    drawn: list[int] = []
    for latent in chosen:
        free = others[~np.isin(others, drawn)]
        near = free[np.argsort(np.abs(place[free] - place[latent]), kind="stable")[:NEIGHBORS]]
        drawn.append(int(rng.choice(near)))
    return np.array(drawn)


def _point(scores: Array, labels: Array) -> tuple[float, float, float]:
    """Accuracy, AUROC and F1."""
    says = scores > 0
    hits = int((says & labels).sum())
    wrong = int((says != labels).sum())
    f1 = 2 * hits / (2 * hits + wrong) if hits else 0.0
    return float((says == labels).mean()), float(stats.auroc(scores, labels)[0]), f1


def _spread(draws: Array) -> Spread:
    if not draws.size:
        return Spread(np.nan, np.nan, np.nan, 0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Spread(float(draws.mean()), float(low), float(high), len(draws))
