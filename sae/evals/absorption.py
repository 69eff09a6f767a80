"""Feature absorption (Chanin et al. 2409.14507), measured on words whose concepts are known.

A latent for "starts with S" is absorbed where it stays silent on some words that start with S, because latents for
these words carry the letter's direction themselves. The concept is known for every word, so what is missing shows.

    found = absorption(sae.encode(acts), acts, sae.W_dec, words, letters)       # or first_letter(lm, sae)
    found.fraction, found.full

1. On train words, a logistic probe for each letter on the raw activations a; p is its direction at length 1.
2. A letter's main latents: the k that best tell its words apart, k growing from 1 while the F1 of their probe grows by
   `f1_jump` (more than one: the letter's latent is split).
3. On the test words of the letter that the probe gets right (log-odds above 0), with proj_i = z_i (d_i . p):

       main     = sum of proj_i over the main latents
       absorbed = sum of the `max_absorbers` largest proj_i > 0 among other latents with cos(d_i, p) >= fraction_cosine
       fraction = 0   if main >= a.p or absorbed < share * a.p
                  1   else, if main <= 0
                  m / (m + main)   else, with m = min(absorbed, a.p - main)
       full     = every main z_i is 0, a.p > 0, and of the latent with the largest proj_i:
                  cos(d_i, p) >= full_cosine and proj_i >= share * a.p

Scores are means over these words; the dictionary's are means over letters.

Sources: SAEBench 0.6 (evals/absorption) for 3 and all thresholds. What differs, here and there: proj_i is the latent's
contribution z_i (d_i . p), there z_i cos(d_i, p), the same for decoder rows of length 1; latents are ranked by their
mean difference, there by the weights of an L1 probe; k is chosen on train words, there on test words; words are split
by their lower-case form, so that " The" and " the" are on one side. So numbers are like those of SAEBench, not equal.

Traps. a.p counts b_dec and the SAE's error, too, for which no latent stands: a bad reconstruction lowers `share`, and
so absorption. A model that does not know letters (below about 1B parameters; word-level tokenizers) has probes that fit
train words only: look at `probe_f1`. Splitting and absorption are told apart by k only: a letter whose latents split
evenly is not absorbed. SAEs narrower than about 16k latents have few latents for single words to absorb into.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sae import stats
from sae.errors import UserError
from sae.evals.geometry import unit
from sae.evals.probing import LatentActs, batches, class_difference, columns, held_out_rows
from sae.probe import Probe, fit_probe
from sae.stats import Interval

Array = np.ndarray

SILENT = 1e-8
"""A latent this close to 0 does not fire."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as absorption; the defaults are SAEBench's."""

    f1_jump: float = 0.03
    """How much F1 must grow for one more main latent."""
    max_main: int = 10
    """Most main latents of a letter."""
    fraction_cosine: float = 0.1
    """Least cosine of an absorbing latent with the probe, for the fraction."""
    full_cosine: float = 0.025
    """Likewise, for full absorption."""
    share: float = 0.4
    """Least part of the probe's projection that absorbing latents must carry."""
    max_absorbers: int = 3
    """Most latents that may absorb together, for the fraction."""
    min_words: int = 10
    """Letters with fewer train words are left out (ours)."""


class WordAbsorption(NamedTuple):
    """Absorption of one concept, word by word."""

    fraction: Float[Tensor, " n"]
    """From 0 (the main latents carry it) to 1 (others do); float64."""
    full: Bool[Tensor, " n"]
    """Whether one other latent stands in for silent main latents."""
    absorber: Int[Tensor, " n"]
    """The latent with the largest projection on the probe."""


class AbsorbedWord(NamedTuple):
    """A fully absorbed word, and the latent that stands in."""

    word: str
    latent: int


class LetterAbsorption(NamedTuple):
    """Absorption of one letter (or other concept)."""

    label: str
    main: list[int]
    """The main latents, best first."""
    probe_f1: float
    """Of the probe on raw activations, on test words."""
    main_f1: float
    """Of the probe on the main latents, on test words."""
    n_words: int
    """Test words that have the label and that the probe gets right: those that are scored."""
    fraction: Interval
    full: Interval
    """Intervals are bootstrapped over groups of words."""
    absorbed: list[AbsorbedWord]


class AbsorptionResult(NamedTuple):
    """Absorption of a dictionary. Means over letters, each counting the same; NaN without letters."""

    fraction: float
    full: float
    n_main: float
    """Mean number of main latents; 1 is no splitting."""
    probe_f1: float
    """Mean F1 of the probes on test words, over all labels with enough train words: what the model knows of them. Near
    0, the figures above are about few words, chosen by chance."""
    letters: list[LetterAbsorption]
    left_out: list[str]
    """Labels with too few train words, or none on the test side that the probe gets right."""


def word_absorption(
    latent_acts: Float[Tensor, "n d_sae"],
    acts: Float[Tensor, "n d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: Sequence[int],
    thresholds: Thresholds = Thresholds(),
) -> WordAbsorption:
    """Score rows that have the concept; the formulas are at the head of this file.

    Args:
        latent_acts: of the rows.
        acts: raw activations of the same rows.
        W_dec: decoder rows, of any length.
        probe: direction of the concept, of any length.
        main: latents that are taken to stand for the concept.
        thresholds: what counts.
    """
    device = latent_acts.device
    p = unit(probe[None].to(device))[0].double()
    decoder = W_dec.detach().to(device)
    cosines = (unit(decoder).double() @ p).float()
    is_main = torch.zeros(len(decoder), dtype=torch.bool, device=device)
    is_main[torch.as_tensor(list(main), dtype=torch.int64, device=device)] = True
    proj = latent_acts.double() * (decoder.double() @ p)
    total = acts.to(device).double() @ p
    carried = proj[:, is_main].sum(1)
    candidates = proj.masked_fill(is_main | (cosines < thresholds.fraction_cosine), 0).clamp_min(0)
    others = candidates.topk(min(thresholds.max_absorbers, len(decoder)), dim=1).values.sum(1)
    # A projection that is not positive leaves nothing to absorb.
    none = (carried >= total) | (others < thresholds.share * total) | (total <= 0)
    moved = torch.minimum(others, total - carried)
    partly = moved / torch.where(none | (carried <= 0), 1, moved + carried)
    fraction = torch.where(none, 0, torch.where(carried <= 0, 1, partly))
    best = proj.max(dim=1)
    silent = (latent_acts[:, is_main].abs() < SILENT).all(1)
    strong = best.values >= thresholds.share * total
    full = silent & (total > 0) & (cosines[best.indices] >= thresholds.full_cosine) & strong
    return WordAbsorption(fraction.cpu(), full.cpu(), best.indices.cpu())


def absorption(
    latent_acts: LatentActs,
    acts: Float[Tensor, "n d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    words: Sequence[str],
    labels: Sequence[str],
    probes: Mapping[str, Probe] | None = None,
    *,
    test: ArrayLike | None = None,
    thresholds: Thresholds = Thresholds(),
    n_draws: int = 1000,
    seed: int = 0,
) -> AbsorptionResult:
    """Measure absorption of every label, given activations at the words.

    Args:
        latent_acts: [n d_sae], or its batches (read three times).
        acts: raw activations.
        W_dec: the decoder.
        words: [n]; those that differ in case only go to the same side.
        labels: [n], one for each word, such as its first letter.
        probes: by label; fitted on train words where not given.
        test: [n], True for test words; by default a third or so, by a hash of the word.
        thresholds: what counts.
        n_draws: bootstrap draws.
        seed: of the split and the bootstrap.

    Raises:
        UserError: numbers of rows that disagree.
    """
    if not len(words) == len(labels) == len(acts):
        raise UserError(f"{len(words)} words, {len(labels)} labels and {len(acts)} activations: give one of each.")
    groups = [word.lower() for word in words]
    held_out = held_out_rows(groups, seed=seed) if test is None else np.asarray(test).astype(bool)
    given = np.asarray(labels)
    known = _known(given, held_out, thresholds)
    if probes is None:
        probes = fit_probes(acts, words, labels, test=held_out, thresholds=thresholds)
    letters: list[LetterAbsorption] = []
    scores: list[float] = []
    if known:
        data = _Data(latent_acts, acts, W_dec, words, groups, held_out, np.isin(given, known), thresholds)
        labelings = np.stack([given == label for label in known])
        for label, has, ranked in zip(known, labelings, _ranked(latent_acts, labelings, data), strict=True):
            probe = probes[label]
            scores.append(_f1(probe.scores(data.raw[held_out]) > 0, has[held_out]))
            found = data.measure(label, has, ranked, probe, scores[-1], n_draws, seed)
            letters += [] if found is None else [found]
    measured = {letter.label for letter in letters}
    return AbsorptionResult(
        fraction=_mean([letter.fraction.estimate for letter in letters]),
        full=_mean([letter.full.estimate for letter in letters]),
        n_main=_mean([len(letter.main) for letter in letters]),
        probe_f1=_mean(scores),
        letters=letters,
        left_out=[str(label) for label in np.unique(given) if label not in measured],
    )


def fit_probes(
    acts: Float[Tensor, "n d_in"],
    words: Sequence[str],
    labels: Sequence[str],
    *,
    test: ArrayLike | None = None,
    thresholds: Thresholds = Thresholds(),
    seed: int = 0,
) -> dict[str, Probe]:
    """Fit the probe of every label on train words, as `absorption` does; for several SAEs of one hook point.

    Args:
        acts: raw activations at the words.
        words: [n], as in `absorption`.
        labels: [n], likewise.
        test: likewise.
        thresholds: `min_words` counts.
        seed: of the split.
    """
    groups = [word.lower() for word in words]
    held_out = held_out_rows(groups, seed=seed) if test is None else np.asarray(test).astype(bool)
    given, train = np.asarray(labels), acts.detach().float().cpu().numpy()[~held_out]
    return {label: fit_probe(train, given[~held_out] == label) for label in _known(given, held_out, thresholds)}


def measurable(
    words: Sequence[str],
    labels: Sequence[str],
    *,
    thresholds: Thresholds = Thresholds(),
    seed: int = 0,
) -> list[str]:
    """Return the labels that `absorption` measures: those with enough words on the train side of its split.

    Args:
        words: [n], as in `absorption`.
        labels: [n], likewise.
        thresholds: `min_words` counts.
        seed: of the split.
    """
    return _known(np.asarray(labels), held_out_rows([word.lower() for word in words], seed=seed), thresholds)


def _known(labels: Array, held_out: Array, thresholds: Thresholds) -> list[str]:
    """Labels that are measured: train words are many enough and not all alike."""
    train = labels[~held_out]
    sizes = {str(label): int((train == label).sum()) for label in np.unique(labels)}
    return [label for label, size in sizes.items() if thresholds.min_words <= size < len(train)]


class _Ranked(NamedTuple):
    """Latents that fire more for a label, best first, and their activations [n m]."""

    latents: list[int]
    x: Array


class _Data:
    """What all labels share. Of the latents' activations only those of test words are kept, and sparsely."""

    def __init__(
        self,
        latent_acts: LatentActs,
        acts: Tensor,
        W_dec: Tensor,
        words: Sequence[str],
        groups: Sequence[str],
        held_out: Array,
        known: Array,
        thresholds: Thresholds,
    ) -> None:
        self.acts, self.W_dec, self.words, self.groups = acts.detach().float().cpu(), W_dec, words, groups
        self.raw, self.held_out, self.thresholds = self.acts.numpy(), held_out, thresholds
        self.kept = np.flatnonzero(held_out & known)
        parts = []
        for start, part in batches(latent_acts, len(held_out)):
            here = self.kept[(self.kept >= start) & (self.kept < start + len(part))] - start
            parts.append(part[torch.from_numpy(here).to(part.device)].to_sparse())
        self.kept_acts = torch.cat(parts)

    def measure(
        self, label: str, has: Array, ranked: _Ranked, probe: Probe, probe_f1: float, n_draws: int, seed: int
    ) -> LetterAbsorption | None:
        """Measure one label; None where no test word of it can be scored."""
        log_odds = probe.scores(self.raw)
        rows = np.flatnonzero(has & self.held_out & (log_odds > 0))
        n_main, main_f1 = self._main(ranked.x, has)
        if len(rows) == 0 or n_main == 0:
            return None
        main = ranked.latents[:n_main]
        places = torch.from_numpy(np.searchsorted(self.kept, rows)).to(self.kept_acts.device)
        latent_acts = self.kept_acts.index_select(0, places).to_dense()
        direction = torch.from_numpy(probe.weight)
        found = word_absorption(latent_acts, self.acts[rows], self.W_dec, direction, main, self.thresholds)
        clusters = [self.groups[int(row)] for row in rows]
        absorbers = zip(rows, found.full.tolist(), found.absorber.tolist(), strict=True)
        return LetterAbsorption(
            label=label,
            main=main,
            probe_f1=probe_f1,
            main_f1=main_f1,
            n_words=len(rows),
            fraction=stats.bootstrap_mean(found.fraction.numpy(), clusters, n_draws, seed),
            full=stats.bootstrap_mean(found.full.numpy(), clusters, n_draws, seed),
            absorbed=[AbsorbedWord(self.words[int(row)], latent) for row, full, latent in absorbers if full],
        )

    def _main(self, x: Array, has: Array) -> tuple[int, float]:
        """How many of the best latents are main, and the F1 of their probe on test words."""
        best, n_main, on_test = -np.inf, 0, np.nan
        train, test = ~self.held_out, self.held_out
        for k in range(1, x.shape[1] + 1):
            says = fit_probe(x[train, :k], has[train]).scores(x[:, :k]) > 0
            score = _f1(says[train], has[train])
            if score < best + self.thresholds.f1_jump:
                break
            best, n_main, on_test = score, k, _f1(says[test], has[test])
        return n_main, on_test


def _ranked(latent_acts: LatentActs, labelings: Array, data: _Data) -> list[_Ranked]:
    """Candidates for the main latents of every label, by mean difference on train words."""
    difference = class_difference(latent_acts, labelings, ~data.held_out).difference
    best = [np.argsort(-row, kind="stable")[: data.thresholds.max_main] for row in difference]
    # Latents that fire less for the label cannot stand for it.
    best = [chosen[row[chosen] > 0] for row, chosen in zip(difference, best, strict=True)]
    wanted = np.unique(np.concatenate(best))
    x = columns(latent_acts, wanted)
    return [_Ranked(chosen.tolist(), x[:, np.searchsorted(wanted, chosen)]) for chosen in best]


def _f1(says: Array, has: Array) -> float:
    hits = int((says & has).sum())
    return 2 * hits / (2 * hits + int((says != has).sum())) if hits else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
