"""The trials of `suite=ground_truth_quick`, shortened to seconds: what finds the features of T1 to T4, what does not.

Budgets are a sixth to an eighth of the suite's, in smaller batches, mostly at three times its learning rate. What was
measured stands at each claim, as the range over three seeds; bars are a little below.
"""

import dataclasses
import statistics

import pytest

from sae.evals import worlds
from sae.stages import ground_truth

SHORT = {
    worlds.t1: {"n_tokens": 500_000, "lr": 1e-2},
    worlds.t2: {"n_tokens": 400_000, "batch_tokens": 256},
    worlds.t3: {"n_tokens": 400_000, "lr": 3e-3},
    worlds.t4: {"n_tokens": 400_000, "lr": 3e-3},
}
TRIALS = {trial.world: trial for trial in ground_truth.QUICK}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Train the trial of a world in short; rows by (architecture, target L0, control), a list over seeds."""

    def judged(world, seeds=(0,)):
        short = {"batch_tokens": 512, **SHORT[world]}
        rows = ground_truth.judge(
            dataclasses.replace(TRIALS[world], **short), tmp_path_factory.mktemp(world.__name__), seeds, "cpu"
        )
        table = {}
        for row in rows:
            table.setdefault((row["architecture"], row["k"], row["control"]), []).append(row)
        return table

    return judged


def assert_found_nothing(row, mcc, fve):
    """A dictionary that was drawn and never learned: directions as chance has them, and still variance explained."""
    assert row["control"] == "random"
    assert row["mcc"] < mcc
    assert row["fve"] > fve


def test_the_suite_has_a_trial_of_every_world_with_a_random_control_beside_it():
    assert list(TRIALS) == [worlds.t1, worlds.t2, worlds.t3, worlds.t4]
    assert all("random" in trial.controls for trial in ground_truth.FULL)


def test_t1_features_at_right_angles_are_found(found):
    """Both: MCC 1.0000, F1 1.0000, L0 4.00 of 4 with every seed. Random: MCC .33 to .35, FVE .22 to .25."""
    table = found(worlds.t1)
    (relu,), (batch_topk,) = table["relu", 4, "none"], table["batch_topk", 4, "none"]
    for row in (relu, batch_topk):
        assert row["mcc"] >= 0.99
        assert row["f1"] >= 0.99
        assert row["dead_fraction"] == 0
    assert relu["l0"] == pytest.approx(4, abs=0.2)
    assert relu["true_l0"] == pytest.approx(4, abs=0.05)
    assert relu["shrinkage"] < 1, "an L1 penalty shrinks"
    assert_found_nothing(table["batch_topk", 4, "random"][0], mcc=0.5, fve=0.15)


def test_t2_rare_and_nested_features_are_found(found):
    """MCC .986 to .987 at L0 .78 to .79. Random: MCC .40 to .43, FVE .13 to .14.

    With other budgets one seed in four finds one feature less (MCC .95): hence the median.
    """
    table = found(worlds.t2, seeds=(0, 1, 2))
    scores = [row["mcc"] for row in table["relu", 0.8, "none"]]
    assert statistics.median(scores) >= 0.97
    assert min(scores) >= 0.92
    for row in table["relu", 0.8, "random"]:
        assert_found_nothing(row, mcc=0.55, fve=0.08)


def test_t3_variance_explained_does_not_say_how_sparse_to_be(found):
    """MCC peaks at the true L0, while FVE rises past it ("Sparse but wrong").

    At L0 5, 11, 18: MCC .72 to .73, .93 to .95, .76 to .81; FVE .68, .970 to .981, .989 to .995. Random (L0 5): MCC .23
    to .24, FVE .16.
    """
    table = found(worlds.t3)
    few, true, many = (table["batch_topk", k, "none"][0] for k in (5, 11, 18))
    assert true["true_l0"] == pytest.approx(10.95, abs=0.1)
    assert true["mcc"] > 0.88
    assert few["mcc"] < true["mcc"] - 0.08
    assert many["mcc"] < true["mcc"] - 0.08
    assert few["fve"] + 0.2 < true["fve"]
    assert true["fve"] + 0.008 < many["fve"]
    assert_found_nothing(table["batch_topk", 5, "random"][0], mcc=0.35, fve=0.1)


def test_t4_nested_prefixes_find_more_of_a_hierarchy_and_explain_less(found):
    """F1 .60 to .62 against .75 to .78, FVE .83 against .79 to .81. Random: MCC .37, F1 .05 to .08, FVE .19 to .20."""
    table = found(worlds.t4)
    (plain,), (nested,) = table["batch_topk", 2, "none"], table["matryoshka_batch_topk", 2, "none"]
    assert nested["f1"] > plain["f1"] + 0.08
    assert nested["fve"] < plain["fve"], "by reconstruction the other would be chosen"
    assert plain["mcc"] > 0.6
    (random,) = table["batch_topk", 2, "random"]
    assert_found_nothing(random, mcc=0.45, fve=0.1)
    assert random["f1"] < 0.2
