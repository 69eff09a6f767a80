"""The published direction, deleted everywhere, is taken where deleting it does most."""

import numpy as np
import pytest

from sae.behavior.contrast import load_contrast
from sae.behavior.directions import difference_of_means
from sae.behavior.measure import collect, margins_each, prepare, prepare_margins
from sae.behavior.select import select_everywhere
from sae.lm.load import load_lm
from sae.organism.corpus import contrast_records
from sae.steering.directions import everywhere

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]


@pytest.fixture(scope="module")
def organism():
    return load_lm("organism", device="cpu")


def test_the_best_of_all_hook_points_and_positions_is_taken(organism):
    contrast = load_contrast([dict(record) for record in contrast_records("deception", 0)], "deception")
    find, select = contrast.split("find"), contrast.split("select")
    records = [*find.positives[:40], *find.negatives[:40]]
    labels = [bool(record.label) for record in records]
    seen = collect(organism, [], prepare(organism, records), (-1, -2), HOOKS)
    assert set(seen.resid) == {(hook, name) for hook in HOOKS for name in ("-1", "-2")}
    found, edits = select_everywhere(organism, seen.resid, labels, select.positives[:24])
    task = prepare_margins(organism, select.positives[:24])
    directions = [difference_of_means(acts, labels, *place) for place, acts in seen.resid.items()]
    groups = [everywhere(organism, one.vector) for one in directions]
    left = [values.mean() for values in margins_each(organism, groups, task)]
    best = directions[int(np.argmin(left))]
    assert (found.hook_name, found.position) == (best.hook_name, best.position)
    assert max(left) - min(left) > 3, "where it is taken decides"
    assert len(edits) == len(groups[0])


def test_classes_that_coincide_give_none(organism):
    same = np.ones((6, organism.d_model), dtype=np.float32)
    assert select_everywhere(organism, {(HOOKS[0], "-1"): same}, [True, False] * 3, []) is None
