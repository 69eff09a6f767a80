"""Rankings against the planted truth: a perfect one, a decoy's, chance, and what shuffled labels give."""

import itertools

import numpy as np
import pytest

from sae import stats
from sae.errors import UserError
from sae.organism.truth import stage_one_weights
from sae.weights import truth
from sae.weights.edit import mask_of, replaced
from sae.weights.findings import Scored, method_row, random_parameters, seeds_rows
from sae.weights.levels import parts_of
from sae.weights.methods import Problem
from sae.weights.null import null_rows, two_sides
from sae.weights.objective import margin_objective


@pytest.mark.parametrize("level", ["row", "column", "neuron", "head"])
def test_the_effects_themselves_rank_perfectly_and_another_behaviours_do_not(organism, level):
    parts = parts_of(organism.lm, organism.matrices, level)
    effects = truth.effects_of(organism.truth, parts)
    own = truth.score(effects[:, 0], effects, organism.truth, "refusal")
    assert (own.auroc, own.auprc, own.decoy_share) == (1.0, 1.0, 0.0)
    assert own.base_rate == own.n_positive / own.n
    other = truth.score(effects[:, 1], effects, organism.truth, "refusal")
    assert other.auprc < 0.5
    assert other.decoy_share > 0.5
    with pytest.raises(UserError, match="'envy'"):
        truth.score(effects[:, 0], effects, organism.truth, "envy")


def test_what_was_not_measured_has_no_truth(organism):
    """Low-rank blocks never have any, organisms from before a level was measured lack it there."""
    old = organism.truth._replace(column_effects={})
    columns = parts_of(organism.lm, organism.matrices, "column")
    assert [truth.is_measured(old, level) for level in ("row", "column", "tensor", "block")] == [
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(UserError, match="'column'"):
        truth.effects_of(old, columns)
    found = Scored("x", "column", 0, 0, np.arange(len(columns), dtype=float), columns)
    assert method_row(found, "refusal", old).auroc is None
    assert method_row(found, "refusal", organism.truth).auroc is not None


def test_effects_are_of_the_parts_they_are_said_to_be(organism):
    """Setting the part with the largest effect back to stage one makes the margin fall about that much."""
    own = {one.name: one.parameter.detach() for one in organism.matrices}
    reference = {name: values.clone() for name, values in own.items()} | stage_one_weights(own, organism.truth)
    for level in ("row", "column", "neuron", "head", "tensor"):
        parts = parts_of(organism.lm, organism.matrices, level)
        effects = truth.effects_of(organism.truth, parts)
        for index, name in enumerate(organism.truth.layout.behaviors):
            best = int(effects[:, index].argmax())
            due = organism.sets[name].split("report").positives[:24]
            objective = margin_objective(organism.lm, due, organism.matrices)
            before = objective.values().mean()
            with replaced(organism.matrices, mask_of([parts[best]], organism.matrices), "restore", reference):
                fall = before - objective.values().mean()
            assert fall == pytest.approx(effects[best, index], rel=0.5), (level, name)


def test_chance_is_chance_over_seeds(organism):
    rows = [
        method_row(
            Scored("chance", "parameter", seed, 0, random_parameters(organism.matrices, seed), []),
            "refusal",
            organism.truth,
        )
        for seed in range(12)
    ]
    (over,) = seeds_rows(rows)
    assert over.auroc.low < 0.5 < over.auroc.high
    assert over.auroc.high - over.auroc.low < 0.2
    assert over.auprc.estimate < 3 * rows[0].base_rate
    assert method_row(Scored("x", "head", 0, 0, np.zeros(0), []), "refusal", None).auroc is None


def side_of(organism):
    """A problem about any records; of the utility nothing is asked."""

    def side(records):
        behavior = margin_objective(organism.lm, records, organism.matrices)
        return Problem(organism.lm, organism.matrices, behavior, behavior, None, None, None)

    return side


def test_shuffled_labels_locate_nothing(organism):
    parts = {"row": parts_of(organism.lm, organism.matrices, "row"), "parameter": []}
    find = organism.sets["refusal"].split("find")
    rows = null_rows(side_of(organism), find, ["taylor"], parts, organism.truth, 8, n_prompts=16)
    assert [(row.method, row.level, row.n_runs, row.auroc.n) for row in rows] == [
        ("taylor", "row", 8, 8),
        ("taylor", "parameter", 8, 8),
    ]
    for row in rows:
        assert row.covers_half
        assert row.auroc.low <= 0.5 <= row.auroc.high
        assert row.true_auroc > row.auroc.high
        assert row.true_located > row.located.estimate > row.base_rate  # parts of large contrasts, of either sign
        assert 1 / 9 <= row.p < 0.5  # a shuffle of few prompts may fall near the true labels
    with pytest.raises(UserError, match="'act_svd' has no contrast"):
        null_rows(side_of(organism), find, ["act_svd"], parts, organism.truth, 2)


def test_labels_that_reach_the_method_past_the_shuffle_show(organism):
    find, side = organism.sets["refusal"].split("find"), side_of(organism)
    true = [[one for one in find.records if one.label is label][:16] for label in (True, False)]
    calls = itertools.cycle(true)
    (row,) = null_rows(
        lambda records: side(next(calls)), find, ["taylor"], {"parameter": []}, organism.truth, 3, n_prompts=16
    )
    assert row.true_auroc > 0.9
    assert not row.covers_half
    assert row.p == 1.0
    (none,) = null_rows(
        lambda records: side(true[0]), find, ["taylor"], {"parameter": []}, organism.truth, 2, n_prompts=16
    )
    assert none.auroc.estimate == none.true_auroc == 0.5  # a score that does not look at its prompts has no contrast


def test_both_sides_of_a_shuffle_are_drawn_alike(organism):
    for name in ("refusal", "style"):
        find = organism.sets[name].split("find")
        counts = []
        for seed in range(40):
            sides = two_sides(find.shuffled(seed), 64, seed)
            assert len(sides[0]) == len(sides[1]) <= 64
            topics = [{record.topic for record in records} for records in sides]
            assert name == "style" or not topics[0] & topics[1]
            label = {record.prompt: record.label for record in find.records}
            counts.append([sum(label[record.prompt] for record in records) / len(records) for records in sides])
        gap = stats.bootstrap_mean([first - second for first, second in counts])
        assert gap.low <= 0 <= gap.high
    true = two_sides(organism.sets["refusal"].split("find"), 64, 0)
    assert all(record.label for record in true[0])
    assert not any(record.label for record in true[1])


def test_sampled_scores_are_those_of_the_sampled_weights(organism):
    scores = random_parameters(organism.matrices, 0)
    found = truth.sampled(organism.truth, scores)
    assert len(found) == len(organism.truth.sample_effects) == 2000
    single = organism.truth.sample[17]
    assert found[17] == float(scores[single.weight][single.row, single.column])
