"""Masks against a located set: a redundant route comes back, a complete set does not, a made behaviour says nothing."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sae.errors import UserError
from sae.lm.matrices import Matrix, Part, Slice
from sae.lm.tokens import TokenBatch
from sae.organism.truth import stage_one_weights
from sae.weights.adversary import FREE, Arena, Box, Masks, Prompts, maskable
from sae.weights.edit import mask_of
from sae.weights.levels import parts_of
from sae.weights.objective import Objective, margin_objective

TRIGGER, ALWAYS = 0, 1
STRONG, DAMPENED, ALWAYS_ON = 4.0, 0.9, 0.5


class Routes:
    """Heads of one coordinate: logits O V x, less 1 for the behaviour. Heads 0 and 1 pass the trigger on, redundantly.

    Head 1 is dampened: by itself it falls short by a little. Head 2 writes elsewhere; head 3 speaks for the behaviour
    on every prompt.
    """

    name = "routes"

    def __init__(self, dampened=DAMPENED):
        self.values = nn.Linear(3, 4, bias=False)
        self.output = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.values.weight.copy_(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]))
            self.output.weight.copy_(torch.tensor([[STRONG, dampened, 0, ALWAYS_ON], [0, 0, 1, 0]]))
        self.bridge = SimpleNamespace(original_model=nn.Sequential(self.values, self.output))
        self.matrices = [
            Matrix("v_proj.weight", 0, "v", self.values.weight, 0),
            Matrix("o_proj.weight", 0, "o", self.output.weight, 0),
        ]
        self.parts = [
            Part("head", 0, i, (Slice("v_proj.weight", 0, i, i + 1), Slice("o_proj.weight", 1, i, i + 1)))
            for i in range(4)
        ]
        self.inputs = torch.tensor([[1.0, 1, 0.3], [1.0, 1, -0.2], [0, 1, 0.5], [0, 1, 0.1]])

    light = staticmethod(contextlib.nullcontext)

    def forward(self, batch):
        return self.output(self.values(self.inputs[batch.tokens]))

    def margin(self, rows):
        ids = torch.tensor(rows)[:, None]
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, 2).to(torch.uint8))
        return Objective(self, self.matrices, batch, lambda logits, rows: logits[:, 0, 0] - 1.0)

    def arena(self, **options):
        due, not_due = (Prompts(self.margin(rows), self.margin(rows)) for rows in ([0, 1], [2, 3]))
        return Arena(self.matrices, self.parts, due, not_due, **{"epsilons": [0.1], **options})

    def mask(self, *heads):
        return mask_of([self.parts[head] for head in heads], self.matrices)


def test_a_hidden_route_comes_back_amplified_and_only_where_the_behavior_is_due():
    toy = Routes(dampened=0.45)  # with what head 3 adds short by .05
    found = toy.arena().run(toy.mask(0), toy.mask(2))
    ball, free = found.removed
    assert (found.n_parts, ball.low, ball.high) == (3, 0.9, 1.1)
    assert ball.located.before.margin == pytest.approx(0.45 + ALWAYS_ON - 1, abs=1e-6)
    assert ball.located.before.rate == 0.0  # the cut looks clean
    assert ball.located.after.margin == pytest.approx((0.45 + ALWAYS_ON) * 1.1**2 - 1, abs=1e-5)
    assert (ball.located.after.rate, ball.not_due.after.rate, ball.comes_back) == (1.0, 0.0, True)
    assert ball.random.before.rate == ball.random.after.rate == 1.0  # another set's cut took nothing away
    # Free masks make the behaviour from head 3 anywhere, so they say nothing about the set.
    assert (free.located.after.rate, free.not_due.after.rate, free.comes_back) == (1.0, 1.0, None)
    small = toy.arena(epsilons=[0.01]).run(toy.mask(0), toy.mask(2)).removed[0]  # .95 * 1.01^2 is below 1
    assert (small.located.after.rate, small.comes_back) == (0.0, False)


def test_a_complete_set_does_not_come_back():
    toy = Routes()
    with torch.no_grad():
        toy.output.weight[0, 3] = 0.2  # doubled twice it is still short
    found = toy.arena().run(toy.mask(0, 1), toy.mask(2, 3))
    for one, factor in zip(found.removed, (1.1, 2.0), strict=True):
        assert one.located.before.rate == 0.0
        assert one.located.after.margin == pytest.approx(0.2 * factor**2 - 1, abs=1e-5)
        assert one.comes_back is False
    left = Routes().arena().run(toy.mask(2), toy.mask(3))  # a cut that removed nothing cannot come back
    assert [one.comes_back for one in left.removed] == [None, None]


def test_what_is_kept_is_enough_or_it_is_not():
    toy = Routes()
    reference = {one.name: torch.zeros_like(one.parameter) for one in toy.matrices}
    (found,) = toy.arena(steps=10).run(toy.mask(0), toy.mask(2), "restore", reference).kept
    assert (found.box, found.low, found.high) == ("to_reference", 0.0, 1.0)
    assert found.located.before.margin == pytest.approx(STRONG + DAMPENED + ALWAYS_ON - 1, abs=1e-5)
    assert found.located.after.margin == pytest.approx(STRONG - 1, abs=1e-5)
    assert found.located.after.rate == 1.0
    assert found.random_set.after.margin == pytest.approx(-1, abs=1e-5)
    assert found.random_set.after.rate == 0.0
    assert found.located.after.margin < found.random_worst.margin <= found.random_mean.margin
    small, ball = toy.arena(epsilons=[0.02, 0.1]).run(toy.mask(0), toy.mask(2)).kept  # without a reference, in balls
    assert small.located.after.margin > ball.located.after.margin
    assert ball.located.after.margin == pytest.approx(STRONG + (DAMPENED + ALWAYS_ON) * 0.81 - 1, abs=1e-5)


def test_gradients_by_masks_are_exact_and_leave_the_set_alone():
    toy = Routes()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in toy.matrices:
            one.parameter.add_(0.3 * torch.randn(one.parameter.shape, generator=generator))
    base = {one.name: 0.2 * torch.randn(one.parameter.shape, generator=generator) for one in toy.matrices}
    fixed = {"o_proj.weight": torch.zeros(2, 4, dtype=torch.bool)}
    fixed["o_proj.weight"][0, 1] = True  # a single weight of head 1
    for own in (None, base):
        masks, objective = Masks(toy.matrices, toy.parts, fixed, own), toy.margin([0, 1, 2])
        now = np.array([0.7, 1.3, 0.2, 1.0])
        values, slope = masks.gradient(objective, now)
        for index in range(4):
            ends = []
            for sign in (1, -1):  # of second order in each mask: the central difference is exact
                moved = now.copy()
                moved[index] += sign * 0.1
                with masks.applied(moved):
                    assert toy.output.weight[0, 1] == masks._start["o_proj.weight"][0, 1]
                    ends.append(objective.values().mean())
            assert slope[index] == pytest.approx((ends[0] - ends[1]) / 0.2, abs=1e-5)
        with masks.applied(now):
            np.testing.assert_allclose(values, objective.values(), atol=1e-6)


def test_the_worst_masks_are_no_better_than_none_for_the_claim_and_stay_in_the_box():
    toy = Routes()
    arena, box = toy.arena(steps=3, restarts=3), Box("odd", 0.4, 1.1)
    masks = Masks(toy.matrices, toy.parts, toy.mask(0), None)
    objective = toy.margin([0, 1])
    for sign in (1.0, -1.0):
        worst = arena.worst(masks, objective, box, sign)
        assert ((worst >= box.low) & (worst <= box.high)).all()
        with masks.applied(worst):
            assert sign * objective.values().mean() >= sign * toy.margin([0, 1]).values().mean()
        assert np.array_equal(worst, arena.worst(masks, objective, box, sign))
    with pytest.raises(UserError, match="nothing is left"):
        toy.arena().run(toy.mask(0, 1, 2, 3), toy.mask(2))


def test_masks_on_the_organism_are_those_of_its_parts_and_are_put_back(organism):
    matrices, parts = maskable(organism.lm, organism.matrices)
    assert len(parts) == 64 + 1792
    before = {one.name: one.parameter.detach().clone() for one in organism.matrices}
    own = {name: values.clone() for name, values in before.items()}
    reference = own | stage_one_weights(own, organism.truth)
    due = organism.sets["refusal"].split("find").positives[:4]
    objective = margin_objective(organism.lm, due, matrices)
    heads = parts_of(organism.lm, organism.matrices, "head")
    masks = Masks(matrices, parts, mask_of(heads[:3], matrices), reference)
    assert len(masks.parts) == len(parts) - 3
    now = np.ones(len(masks.parts))
    _, slope = masks.gradient(objective, now)
    best = int(np.abs(slope).argmax())
    ends = []
    for sign in (1, -1):
        moved = now.copy()
        moved[best] += sign * 0.02
        with masks.applied(moved):
            ends.append(objective.values().mean())
    assert slope[best] == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.05)

    def fail():
        with masks.applied(np.full(len(masks.parts), FREE.high)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(one.parameter, before[one.name]) for one in organism.matrices)
