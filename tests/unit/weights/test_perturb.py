"""Perturbation methods where the truth is known: metrics in closed form, redundant parts, the organism."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import sae
from sae import stats
from sae.behavior.contrast import load_contrast
from sae.behavior.measure import margins, prepare_margins
from sae.errors import UserError
from sae.lm.matrices import Matrix, Part, Slice, block_matrices, heads, neurons
from sae.organism.corpus import contrast_records
from sae.organism.load import organism_folder
from sae.organism.truth import read_planted
from sae.weights.perturbation.adaptive import adaptive
from sae.weights.perturbation.evolution import evolution
from sae.weights.perturbation.margins import MarginMetric
from sae.weights.perturbation.noise import gradient_directed, plain, random
from sae.weights.perturbation.regions import edited, regions
from sae.weights.perturbation.registry import METHODS

N_PROMPTS = 6


class Toy:
    """Two matrices, a metric that is linear in them with a gradient of its own for each prompt, and a bend if asked.

    Parts are rows of the first matrix and columns of the second.
    """

    def __init__(self, bend: float = 0.0, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        shapes = {"a": (6, 3), "b": (4, 5)}
        self.weights = {
            name: nn.Parameter(torch.randn(shape, generator=source).double()) for name, shape in shapes.items()
        }
        self.slopes = {
            name: torch.randn((N_PROMPTS, *shape), generator=source).double() for name, shape in shapes.items()
        }
        self.start = {name: values.detach().clone() for name, values in self.weights.items()}
        self.bend = bend
        self.matrices = [Matrix(name, layer, "", self.weights[name], 0) for layer, name in enumerate(shapes)]
        self.parts = [Part("row", 0, i, (Slice("a", 0, i, i + 1),)) for i in range(6)]
        self.parts += [Part("neuron", 1, i, (Slice("b", 1, i, i + 1),)) for i in range(5)]
        self.evaluations = 0

    def __call__(self):
        self.evaluations += 1
        total = sum((self.slopes[name] * self.weights[name].detach()).sum(dim=(1, 2)) for name in self.weights)
        bent = sum((self.weights[name].detach() - self.start[name]).square().sum() for name in self.weights)
        return (total + self.bend * bent).numpy()

    def slope(self, name):
        return self.slopes[name].mean(dim=0)

    def gradients(self):
        return {name: self.slope(name) for name in self.weights}

    def size(self, name, relative):
        return relative * float(self.start[name].square().mean().sqrt())

    def per_part(self, of):
        """Sum over each part's weights of what `of` gives for a matrix."""
        return np.array([sum(float(one.of(of(one.name)).sum()) for one in part.slices) for part in self.parts])

    @property
    def falls(self):
        """What taking each part away takes off the metric."""
        return self.per_part(lambda name: self.slope(name) * self.start[name])

    @property
    def untouched(self):
        return all(torch.equal(self.weights[name], self.start[name]) for name in self.weights)


def run(method, toy, **options):
    if method == "gradient_directed":
        options["gradients"] = toy.gradients
    return METHODS[method](toy, toy.matrices, toy.parts, **options)


@pytest.mark.parametrize("method", METHODS)
def test_budget_seed_and_weights_are_kept(method):
    for budget in (3, 10, 41):
        toy = Toy()
        found = run(method, toy, budget=budget, seed=3)
        assert toy.evaluations == found.evaluations <= budget
        assert toy.untouched
        assert found.scores.shape == found.errors.shape == (len(toy.parts),)
        assert np.isfinite(found.scores).all()
        assert found.curve[-1].evaluations == found.evaluations
        assert np.array_equal(found.curve[-1].scores, found.scores)
        assert np.array_equal(run(method, Toy(), budget=budget, seed=3).scores, found.scores)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_put_back_when_the_metric_fails(method):
    class Failing(Toy):
        def __call__(self):
            if self.evaluations == 4:
                assert not self.untouched
                raise RuntimeError("out of memory")
            return super().__call__()

    toy = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(method, toy, budget=50)
    assert toy.untouched


def test_a_whole_search_measures_every_part_exactly():
    toy = Toy()
    found = adaptive(toy, toy.matrices, toy.parts, budget=100)
    np.testing.assert_allclose(found.scores, toy.falls, atol=1e-12)
    each = toy.slopes["a"][:, 2] * toy.start["a"][2]
    assert found.errors[2] == pytest.approx(float(each.sum(dim=1).std()) / math.sqrt(N_PROMPTS))
    np.testing.assert_allclose(found.detail["hidden"], 0, atol=1e-12)  # nothing hides where effects are sums
    # A first look shares what each group did among its parts.
    coarse = adaptive(toy, toy.matrices, toy.parts, budget=3)
    np.testing.assert_allclose(coarse.scores[:6], toy.falls[:6].mean(), atol=1e-12)
    np.testing.assert_allclose(coarse.scores[6:], toy.falls[6:].mean(), atol=1e-12)


def test_with_a_reference_only_what_differs_from_it_counts():
    toy = Toy()
    base = {name: value.clone() for name, value in toy.start.items()}
    base["a"][2] = 0.0  # but for this row the two models are the same
    found = adaptive(toy, toy.matrices, toy.parts, budget=100, reference=base)
    assert found.scores[2] == pytest.approx(toy.falls[2])
    np.testing.assert_allclose(np.delete(found.scores, 2), 0, atol=1e-12)
    with pytest.raises(UserError, match="same architecture"):
        adaptive(toy, toy.matrices, toy.parts, reference={"a": base["a"]})


def test_a_search_divides_only_where_the_effect_is():
    toy = Toy()
    weight = nn.Parameter(torch.ones(256, 1, dtype=torch.float64))
    toy.weights, matrices = {"a": weight}, [Matrix("a", 0, "", weight, 0)]
    toy.start = {"a": weight.detach().clone()}
    toy.slopes = {"a": torch.zeros(N_PROMPTS, 256, 1, dtype=torch.float64)}
    toy.slopes["a"][:, [17, 201], 0] = torch.tensor([1.0, -1.0]).double()  # which cancel in the mean...
    toy.slopes["a"][:3, 17] *= 2  # ...but not on every prompt
    parts = [Part("neuron", 0, i, (Slice("a", 0, i, i + 1),)) for i in range(256)]
    found = adaptive(toy, matrices, parts, budget=40, seed=1)
    assert found.scores.argmax() == 17
    assert found.scores.argmin() == 201
    assert toy.evaluations <= 40
    assert np.count_nonzero(found.scores) == 2


def test_redundant_parts_hide_each_other_and_are_reported():
    weight = nn.Parameter(torch.ones(16, 1))
    parts = [Part("neuron", 0, i, (Slice("a", 0, i, i + 1),)) for i in range(16)]

    def metric():  # either of the first two suffices
        return np.full(4, float(weight.detach()[:2].sum().clamp(max=1.0) + 0.1 * weight.detach()[2]))

    found = adaptive(metric, [Matrix("a", 0, "", weight, 0)], parts, budget=100)
    assert found.scores[2] == pytest.approx(0.1)
    np.testing.assert_allclose(found.scores[[0, 1]], 0, atol=1e-6)  # no single ablation finds them
    hidden = found.detail["hidden"]  # but what the two do together is not lost
    assert hidden[:2].min() > 0.05
    assert hidden.sum() == pytest.approx(1.0)


def test_noise_probes_see_what_ablation_of_zeros_cannot():
    toy = Toy()
    with torch.no_grad():
        toy.weights["a"][2] = 0
    assert adaptive(toy, toy.matrices, toy.parts, budget=100).scores[2] == 0
    found = adaptive(toy, toy.matrices, toy.parts, budget=100, probe="noise", strength=0.1)
    assert found.scores.min() > 0


@pytest.mark.parametrize("space", ["parts", "weights"])
def test_evolution_is_unbiased_and_knows_its_error(space):
    toy = Toy(bend=3.0)
    found = evolution(toy, toy.matrices, toy.parts, budget=8001, space=space)
    away = (found.scores - toy.falls) / found.errors
    assert np.abs(away).max() < 4
    assert 0.4 < np.sqrt(np.mean(away**2)) < 1.8
    blocks = {0: range(6), 1: range(6, 11)}
    if space == "parts":  # the variance that the docstring states
        for block in blocks.values():
            own = toy.falls[list(block)]
            stated = np.sqrt((np.square(own).sum() - own**2) / 2000)
            np.testing.assert_allclose(found.errors[list(block)], stated, rtol=0.15)


def test_opposite_draws_take_the_second_order_out():
    straight, bent = Toy(), Toy(bend=50.0)
    first, second = (evolution(toy, toy.matrices, toy.parts, budget=401, relative=0.5) for toy in (straight, bent))
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-9)
    # As many evaluations, each draw alone: f(up) - f(clean) carries the bend.
    rng, where = np.random.default_rng(0), regions(bent.parts[:6])
    clean, alone = bent().mean(), []
    for _ in range(200):
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=6))
        with edited(bent.weights, where, lambda region, values, signs=signs: values * (1 + 0.5 * signs[:, None])):
            alone.append((bent().mean() - clean) / 0.5 * signs.numpy())
    error = np.std(alone, axis=0, ddof=1) / math.sqrt(200)
    assert (error > 10 * second.errors[:6]).all()


def test_random_estimates_first_and_second_order():
    toy, relative, bend = Toy(bend=0.7), 0.5, 0.7
    found = random(toy, toy.matrices, toy.parts, budget=8001, relative=relative)
    first = toy.per_part(lambda name: (toy.size(name, relative) * toy.slope(name)).square())
    second = toy.per_part(lambda name: bend * torch.full_like(toy.start[name], toy.size(name, relative) ** 2))
    assert (np.abs(found.scores - first) < 4 * found.errors).all()
    assert (np.abs(found.detail["second"] - second) < 4 * found.detail["second_error"]).all()
    assert (found.errors < 0.3 * first).all()
    straight = random(Toy(), toy.matrices, toy.parts, budget=101)
    assert np.abs(straight.detail["second"]).max() < 1e-9


def test_gradient_directed_finds_the_norm_of_the_gradient():
    toy, relative = Toy(), 0.1
    found = gradient_directed(toy, toy.matrices, toy.parts, gradients=toy.gradients, budget=50, relative=relative)
    norms = np.sqrt(toy.per_part(lambda name: toy.slope(name).square()))
    weights = toy.per_part(lambda name: torch.ones_like(toy.start[name]))
    sizes = np.array([toy.size(part.slices[0].name, relative) for part in toy.parts])
    np.testing.assert_allclose(found.scores, sizes * np.sqrt(weights) * norms, rtol=1e-6)
    np.testing.assert_allclose(found.detail["promised"], found.scores, rtol=1e-9)
    with pytest.raises(UserError, match="lack 'b'"):
        gradient_directed(toy, toy.matrices, toy.parts, gradients=lambda: {"a": toy.slope("a")}, budget=50)


def test_plain_estimates_what_it_states():
    toy, relative = Toy(), 0.2
    toy.slopes["b"] *= 0.2
    found = plain(toy, toy.matrices, toy.parts, budget=6_001, relative=relative)
    squares = toy.per_part(lambda name: (toy.size(name, relative) * toy.slope(name)).square())
    weights = toy.per_part(lambda name: torch.ones_like(toy.start[name]))
    whole = squares.sum()
    stated = math.sqrt(2 / math.pi * whole) * (1 + squares / whole / weights)
    assert (np.abs(found.scores - stated) < 4.5 * found.errors).all()
    assert stats.spearman(found.scores, stated).rho > 0.5
    # Everything has nearly one and the same score, however different the parts are.
    assert squares.max() / squares.min() > 20
    assert found.scores.max() / found.scores.min() < 1.3


def test_what_cannot_be_measured_is_refused():
    toy = Toy()
    for wrong, message in (
        (lambda: adaptive(toy, toy.matrices, toy.parts, budget=1), "budget of 1"),
        (lambda: adaptive(toy, toy.matrices, toy.parts, probe="shake"), "shake"),
        (lambda: adaptive(toy, toy.matrices, toy.parts, strength=0), "strength 0"),
        (lambda: adaptive(toy, toy.matrices[:1], toy.parts), "not among the matrices"),
        (lambda: adaptive(toy, toy.matrices, []), "no parts"),
        (lambda: random(toy, toy.matrices, toy.parts, relative=0), "size 0"),
        (lambda: evolution(toy, toy.matrices, toy.parts, relative=-1), "size -1"),
        (lambda: evolution(toy, toy.matrices, toy.parts, space="rows"), "rows"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    assert toy.untouched


# On the organism


@pytest.fixture(scope="module")
def lm():
    return sae.load_lm("organism")


@pytest.fixture(scope="module")
def contrast():
    return load_contrast(contrast_records("refusal", 0, 40), "refusal")


def test_forwards_started_in_the_middle_are_whole_ones(lm, contrast):
    due, not_due = (prepare_margins(lm, records[:6]) for records in (contrast.positives, contrast.negatives))
    metric, both = MarginMetric(lm, due), MarginMetric(lm, due, not_due)
    np.testing.assert_allclose(metric(), margins(lm, due), atol=1e-5)
    gap = margins(lm, due).mean() - margins(lm, not_due).mean()
    assert both().mean() == pytest.approx(gap / 2, abs=1e-5)
    parameters = {matrix.name: matrix.parameter for matrix in block_matrices(lm)}
    for layer in range(lm.n_layers):
        where = regions([part for part in neurons(lm) if part.layer == layer][::7])
        with edited(parameters, where, lambda region, values: 0 * values):
            np.testing.assert_allclose(metric.from_layer(layer), metric(), atol=1e-4)
            assert np.abs(metric() - margins(lm, due)).max() < 1e-5
        assert np.abs(metric.from_layer(layer) - margins(lm, due)).max() < 1e-4


def test_a_search_finds_what_is_planted_and_the_classical_way_does_not(lm, contrast):
    matrices = block_matrices(lm)
    before = {matrix.name: matrix.parameter.detach().clone() for matrix in matrices}
    parts = [*heads(lm, matrices), *neurons(lm, matrices)]
    metric = MarginMetric(lm, prepare_margins(lm, contrast.positives[:8]))
    planted = read_planted(organism_folder())
    effect = {"head": planted.head_effects[..., 0], "neuron": planted.neuron_effects[..., 0]}
    share = np.array([float(effect[part.level][part.layer, part.number]) for part in parts]) / planted.margins[0].item()

    def areas(found):
        for level in effect:
            own = np.array([part.level == level for part in parts])
            yield float(stats.auroc(found.scores[own], share[own] > 0.01)[0])

    searched, classical = (
        list(areas(method(metric, matrices, parts, budget=200, seed=0))) for method in (adaptive, plain)
    )
    assert searched[0] >= 0.9
    assert searched[1] >= 0.8  # after a ninth of an evaluation a part
    assert min(searched) > max(classical) + 0.15
    assert all(torch.equal(matrix.parameter, before[matrix.name]) for matrix in matrices)
