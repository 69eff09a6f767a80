"""Attribution in closed form on one matrix, and on the organism where two models differ in known places."""

import pytest
import torch

from sae.behavior.cost import own_replies
from sae.behavior.measure import prepare
from sae.organism.truth import stage_one_weights
from sae.weights import attribution
from sae.weights.edit import rewritten
from sae.weights.levels import aggregate, parts_of
from sae.weights.objective import passage_of
from sae.weights.responses import input_norms

NAME = "toy.o_proj.weight"


def test_first_order_scores_of_a_quadratic(toy):
    # f(W) = mean |W x|^2 / 2, so its gradient is W C with C the mean of x x'.
    w, x = toy.linear.weight.detach().clone(), toy.inputs
    gradient = w @ (x.T @ x) / len(x)
    base = {NAME: 0.5 * torch.ones_like(w)}
    for batch in (64, 2):
        objective = toy.quadratic(batch)
        torch.testing.assert_close(attribution.taylor(objective)[NAME], w * gradient)
        torch.testing.assert_close(attribution.snip(objective, base)[NAME], ((w - 0.5) * gradient).abs())
        each = torch.stack([torch.outer(w @ one, one) for one in x])
        torch.testing.assert_close(attribution.fisher(objective)[NAME], w.square() * each.square().mean(dim=0))
        torch.testing.assert_close(
            attribution.sensitivity(objective, base)[NAME], (w - 0.5).abs() * each.abs().mean(dim=0)
        )
        assert objective.evaluations == 12


def test_integrated_gradients_share_out_the_whole_change(toy):
    objective = toy.quadratic()
    w = toy.linear.weight.detach().clone()
    for baseline in (None, {NAME: torch.randn(3, 4, generator=torch.Generator().manual_seed(3))}):
        found = attribution.integrated_gradients(objective, baseline, steps=2)[NAME]
        assert torch.equal(toy.linear.weight, w)
        start = torch.zeros_like(w) if baseline is None else baseline[NAME]
        here = objective.values().mean()
        with rewritten(toy.matrices, {NAME: start}):
            there = objective.values().mean()
        assert float(found.sum()) == pytest.approx(here - there, rel=1e-4)  # exact: the gradient is linear


def test_integrated_gradients_put_the_weights_back_after_an_error(toy):
    w = toy.linear.weight.detach().clone()

    def stop(what, done, total):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        attribution.integrated_gradients(toy.quadratic(), progress=stop)
    assert torch.equal(toy.linear.weight, w)


def test_wanda_weighs_by_inputs_where_tokens_are_predicted(toy):
    passage = toy.passage([[0, 1, 4], [2, 2, 3]])  # 4 and 3 predict nothing
    norm = toy.inputs[[0, 1, 2, 2]].norm(dim=0)
    torch.testing.assert_close(input_norms(toy, passage, toy.matrices)[NAME], norm)
    found = attribution.wanda(toy, passage, toy.matrices)[NAME]
    torch.testing.assert_close(found, toy.linear.weight.detach().abs() * norm)


def test_act_svd_takes_what_only_one_side_uses(toy):
    # Outputs along axis 0 on the first side, along axis 1 on the other.
    with torch.no_grad():
        toy.linear.weight.zero_()
        toy.linear.weight[0, 0], toy.linear.weight[1, 1] = 2.0, 3.0
    toy.inputs = torch.zeros(5, 4)
    toy.inputs[0, 0] = toy.inputs[1, 1] = 1.0
    shown, other = toy.passage([[0, 4]]), toy.passage([[1, 4]])
    (found,) = attribution.act_svd(toy, shown, other, toy.matrices, 1, 1)[NAME]
    assert found.gain == pytest.approx(2.0)
    expected = torch.zeros(3, 4)
    expected[0, 0] = 2.0
    torch.testing.assert_close(attribution.removed_by([found])[NAME], expected, atol=1e-6, rtol=0)
    left = attribution.without([found])[NAME]
    torch.testing.assert_close(left, toy.linear.weight.detach() - expected, atol=1e-6, rtol=0)
    both = attribution.act_svd(toy, shown, shown, toy.matrices, 1, 1)[NAME]
    assert sum(one.gain for one in both) < 1e-5


def test_differences_of_models_lie_where_they_were_made(organism):
    lm, matrices, truth = organism.lm, organism.matrices, organism.truth
    own = {one.name: one.parameter.detach() for one in matrices}
    reference = {name: values.clone() for name, values in own.items()} | stage_one_weights(own, truth)
    # Heads of layer 0: later base parts feel the planted ones, if only through the norms.
    first = [part for part in parts_of(lm, matrices, "head") if part.layer == 0]
    planted = {head for name in truth.layout.behaviors for head in truth.layout.heads(name)}
    passage = passage_of(own_replies(lm, prepare(lm, organism.sets["refusal"].positives[:8]), 4), lm.pad_id)
    for scores in (
        attribution.weight_difference(matrices, reference),
        attribution.activation_difference(lm, passage, matrices, reference),
    ):
        found = aggregate(scores, first)
        assert all((value > 1e-4) == (part.number in planted) for part, value in zip(first, found, strict=True))
    assert all(torch.equal(one.parameter, own[one.name]) for one in matrices)
