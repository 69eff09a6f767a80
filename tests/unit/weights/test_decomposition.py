"""Parameter decomposition: the toy model whose parts are known, exactness, gradients, resuming, and a behaviour."""

import json

import pytest
import torch
from superposition import SETTINGS, Superposition, SuperpositionTarget
from tiny_lms import save_checkpoint
from torch import nn

import sae
from sae.config import DecompositionConfig
from sae.errors import UserError
from sae.lm.matrices import Matrix, block_matrices
from sae.stages.decomposition import settings_of
from sae.weights.decomposition import gates
from sae.weights.decomposition.carriers import find_carriers, weight_scores
from sae.weights.decomposition.components import Decomposition, oriented
from sae.weights.decomposition.evaluate import ACTIVE, evaluate, worst
from sae.weights.decomposition.forward import frozen, masked
from sae.weights.decomposition.known import match
from sae.weights.decomposition.masks import Masks, gated, shuffled, stochastic, whole
from sae.weights.decomposition.saved import open_decomposition
from sae.weights.decomposition.settings import DecompositionSettings
from sae.weights.decomposition.target import LanguageTarget
from sae.weights.decomposition.train import clean_run, decompose, losses
from sae.weights.edit import rewritten

TOY = DecompositionSettings(**SETTINGS)
QUICK = DecompositionSettings(components=8, gates="each", hidden=4, steps=12, lr=0.01, faithfulness=1.0)


@pytest.fixture(scope="module")
def toy_target():
    return SuperpositionTarget(Superposition(), batch_rows=384)


@pytest.fixture(scope="module")
def decomposed(toy_target):
    return decompose(toy_target, TOY)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "helium"])
def lm(request, tmp_path_factory):
    return sae.load_lm(str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return sae.load_lm(str(save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")), device="cpu")


def text(lm, n=12):
    return lm.tokenize([f"row {i} says {'this' if i % 2 else 'that and more'}" for i in range(n)])


def test_the_features_of_the_toy_model_are_found(toy_target, decomposed):
    truth = toy_target.truth()
    for name, true in truth.items():
        found = match(decomposed.pieces(name), true)
        assert found.mmcs > 0.95, (name, found)
        assert abs(found.l2_ratio - 1) < 0.05, (name, found)
        # One component a feature, and another for each.
        _, inputs = clean_run(toy_target, 0.7 * torch.eye(5))
        on = decomposed.importance(inputs)[name].masks > ACTIVE
        assert on.sum(dim=1).tolist() == [1] * 5
        assert on.sum(dim=0).max() == 1
    assert decomposed.unfaithfulness(toy_target.matrices) < 1e-4


def test_untrained_components_do_not_match_and_the_true_ones_do(toy_target):
    fresh = Decomposition(toy_target.matrices, TOY)
    truth = toy_target.truth()
    assert all(match(fresh.pieces(name), true).mmcs < 0.9 for name, true in truth.items())
    with torch.no_grad():
        one = fresh.pieces("embed.weight")
        one.U.zero_()
        one.U[:5], one.V[:5] = 3 * toy_target.root.embed.weight.t(), torch.eye(5)
    found = match(one, truth["embed.weight"])
    assert found.mmcs == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(3)


def test_the_worst_masks_are_worse_than_random_ones(toy_target, decomposed):
    report = evaluate(toy_target, decomposed)
    assert report.stochastic < report.adversarial
    assert report.gated < report.shuffled
    assert report.l0 == pytest.approx(sum(report.l0_of.values()))
    assert report.l0 < 1  # five features of probability .05, two matrices
    assert report.n_alive == 10
    batch = toy_target.draw(torch.Generator().manual_seed(3))
    clean, inputs = clean_run(toy_target, batch)
    importance = {name: one.masks for name, one in decomposed.importance(inputs).items()}
    with frozen(toy_target.root):
        found = worst(toy_target, decomposed, batch, clean, importance, torch.Generator().manual_seed(0))
    for name, one in importance.items():
        assert (found.components[name] >= one - 1e-6).all()
        assert (found.components[name] <= 1 + 1e-6).all()


def test_a_start_is_faithful_wherever_components_span_a_side():
    for shape, count in (((6, 4), 0), ((4, 6), 0), ((6, 4), 5), ((4, 6), 9)):
        matrix = Matrix("m.weight", 0, "", nn.Parameter(torch.randn(shape)), 0)
        made = Decomposition([matrix], DecompositionSettings(components=count))
        assert made.unfaithfulness([matrix]) < 1e-9
    few = Decomposition([matrix], DecompositionSettings(components=3))
    assert 0.01 < few.unfaithfulness([matrix]) < 1


def test_sigmoids_and_their_leaks():
    z = torch.tensor([-1.0, -1.0, 0.25, 2.0], requires_grad=True)
    value = gates.lower(z)
    assert value.tolist() == [0, 0, 0.25, 1]
    (slope,) = torch.autograd.grad(value, z, torch.tensor([1.0, -1.0, 1.0, 1.0]))
    torch.testing.assert_close(slope, torch.tensor([0.0, -0.01, 1.0, 0.0]))
    value = gates.upper(z)
    torch.testing.assert_close(value.detach(), torch.tensor([0.0, 0.0, 0.25, 1.01]))
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 1.0, 0.01]))


def test_all_masks_at_one_are_the_model_to_the_last_bit(lm):
    matrices, batch = block_matrices(lm), text(lm)
    target = LanguageTarget(lm, matrices, batch)
    made = Decomposition(matrices, DecompositionSettings(components=5))  # too few to sum to a matrix
    clean, inputs = clean_run(target, batch)
    importance = {name: one.masks for name, one in made.importance(inputs).items()}
    with torch.no_grad(), masked(target.root, matrices, made, whole(importance)):
        assert torch.equal(target.outputs(batch), clean)
    with torch.no_grad(), masked(target.root, matrices, made, gated(importance)):
        assert not torch.allclose(target.outputs(batch), clean, atol=1e-3)
    assert torch.equal(target.outputs(batch), clean)


def test_a_mask_is_what_it_is_in_the_weights(lm):
    """Masks that are alike at all tokens are other weights."""
    matrices, batch = block_matrices(lm), text(lm)
    target = LanguageTarget(lm, matrices, batch)
    made = Decomposition(matrices, DecompositionSettings(components=5))
    _, inputs = clean_run(target, batch)
    m, rest = torch.tensor([0.0, 1.0, 0.3, 0.7, 1.0]), 0.4
    for matrix in [matrix for matrix in matrices if matrix.layer == 1]:
        one, shape = made.pieces(matrix.name), inputs[matrix.name].shape[:-1]
        masks = Masks({matrix.name: m.expand(*shape, 5)}, {matrix.name: torch.full((*shape, 1), rest)})
        with torch.no_grad(), masked(target.root, matrices, made, masks):
            found = target.outputs(batch)
        with torch.no_grad():
            weight = rest * (oriented(matrix) - one.total()) + (one.U * m[:, None]).t() @ one.V
        with torch.no_grad(), rewritten(matrices, {matrix.name: weight if matrix.out_axis == 0 else weight.t()}):
            torch.testing.assert_close(found, target.outputs(batch), atol=1e-4, rtol=1e-4)


def test_gradients_of_the_loss(toy_target):
    """The whole loss against differences, where its draws are the same and no gate is at a corner."""
    made = Decomposition(toy_target.matrices, QUICK)
    with torch.no_grad():
        for one in made:
            one.gate.second.mul_(0.05)  # every gate near a half
    with frozen(toy_target.root):

        def value():
            return losses(toy_target, made, 0).weighted(made.settings)

        for pieces in made:
            for parameter in (pieces.U, pieces.V, pieces.gate.first, pieces.gate.second_bias):
                (slope,) = torch.autograd.grad(value(), parameter)
                direction = slope / slope.norm()
                with torch.no_grad():
                    step = 1e-2
                    parameter.add_(direction, alpha=step)
                    high = value()
                    parameter.sub_(direction, alpha=2 * step)
                    low = value()
                    parameter.add_(direction, alpha=step)
                assert float((high - low) / (2 * step)) == pytest.approx(float(slope.norm()), rel=0.02)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(toy_target, tmp_path):
    straight = decompose(toy_target, QUICK, tmp_path / "a")
    decompose(toy_target, QUICK, tmp_path / "b", until=5)
    assert (tmp_path / "b" / "training.safetensors").is_file()
    with pytest.raises(UserError, match="not finished"):
        open_decomposition(tmp_path / "b", toy_target.matrices)
    with pytest.raises(UserError, match="other settings"):
        decompose(toy_target, DecompositionSettings(steps=12), tmp_path / "b")
    decompose(toy_target, QUICK, tmp_path / "b")
    for name in ("components.safetensors", "decomposition.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["components.safetensors", "decomposition.json"]
    opened = open_decomposition(tmp_path / "b", toy_target.matrices)
    assert opened.rows_run == straight.rows_run == 7 * 12 * toy_target.batch_rows
    for name, value in straight.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value)
    steps = []
    decompose(toy_target, QUICK, tmp_path / "b", progress=lambda what, done, total: steps.append(done))
    assert steps == []


def test_folders_that_hold_something_else_are_refused(toy_target, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no parameter decomposition"):
        decompose(toy_target, QUICK, tmp_path)
    decompose(toy_target, QUICK, tmp_path / "a")
    with pytest.raises(UserError, match="another model"):
        open_decomposition(tmp_path / "a", toy_target.matrices[:1])
    with pytest.raises(UserError, match="another model"):
        open_decomposition(tmp_path / "a", toy_target.matrices, "some other")
    record = json.loads((tmp_path / "a" / "decomposition.json").read_text())
    (tmp_path / "a" / "decomposition.json").write_text(json.dumps(record | {"settings": {"speed": 3}}))
    with pytest.raises(UserError, match="other settings"):
        open_decomposition(tmp_path / "a", toy_target.matrices)


def test_a_model_that_is_too_large_is_refused():
    large = Matrix("big.weight", 0, "", nn.Parameter(torch.empty(30_001, 1_000, device="meta")), 0)
    with pytest.raises(UserError, match="30,001,000 weights"):
        Decomposition([large])


@pytest.mark.parametrize(("name", "value"), [("gates", "none"), ("steps", 0), ("lr", 0.0), ("sparsity", -1.0)])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=name):
        DecompositionSettings(**{name: value})


def test_the_configuration_has_the_same_defaults():
    assert settings_of(DecompositionConfig()) == DecompositionSettings()


def test_on_a_language_model_the_loss_falls_and_importance_says_which(llama):
    matrices = [matrix for matrix in block_matrices(llama) if matrix.layer == 1]
    target = LanguageTarget(llama, matrices, text(llama, 24), batch_rows=8)
    before = [one.parameter.detach().clone() for one in matrices]
    settings = DecompositionSettings(steps=80, lr=5e-3, sparsity=1e-2, hidden=16, faithfulness=1.0)
    fresh, made = Decomposition(matrices, settings), decompose(target, settings)
    with frozen(target.root):
        total = [
            sum(float(losses(target, one, step).weighted(settings).detach()) for step in range(900, 910))
            for one in (fresh, made)
        ]
    assert total[1] < 0.5 * total[0]
    report = evaluate(target, made, n_batches=1)
    assert report.l0 < 0.8 * evaluate(target, fresh, n_batches=1, pgd_steps=1).l0
    assert report.gated < 0.5 * report.shuffled
    assert report.stochastic < report.adversarial
    assert all(torch.equal(one.parameter, old) for one, old in zip(matrices, before, strict=True))


def test_masks_are_drawn_within_their_bounds():
    importance = {"m": torch.rand(50, 7)}
    drawn = stochastic(importance, torch.Generator().manual_seed(0))
    assert ((drawn.components["m"] >= importance["m"]) & (drawn.components["m"] <= 1)).all()
    dealt = shuffled(importance, torch.Generator().manual_seed(0))
    assert torch.equal(dealt.components["m"].sort(dim=1).values, importance["m"].sort(dim=1).values)
    assert not torch.equal(dealt.components["m"], importance["m"])


def test_carriers_in_closed_form(toy):
    """Half the mean squared output of one matrix: attribution, measured effect, and the scores they are shared into."""
    made = Decomposition(toy.matrices, DecompositionSettings(components=4, hidden=3))
    one, w = made.pieces(toy.matrices[0].name), toy.linear.weight.detach()
    objective = toy.quadratic()
    carried = find_carriers(toy, made, objective, toy.passage([[0, 1, 4]]), toy.passage([[2, 3, 4]]), n_measured=2)
    found = carried.components
    assert objective.evaluations == 3 + 1 + 2
    C = toy.inputs.t() @ toy.inputs / len(toy.inputs)
    with torch.no_grad():
        for item in found:
            part = one.component(item.component)
            left = w - part
            assert item.attribution == pytest.approx(float((part * (w @ C)).sum()), rel=1e-4)
            if item.effect is not None:
                fall = 0.5 * ((w @ C @ w.t()).trace() - (left @ C @ left.t()).trace())
                assert item.effect == pytest.approx(float(fall), rel=1e-4)
            own = one.importance(toy.inputs[[0, 1]]).masks.mean(dim=0)[item.component]
            assert item.due == pytest.approx(float(own), abs=1e-6)
    measured = [item for item in found if item.effect is not None]
    assert len(measured) == 2
    assert min(abs(item.attribution) for item in measured) >= max(
        abs(item.attribution) for item in found if item.effect is None
    )
    scores = weight_scores(made, carried, toy.matrices)[one.name]
    kept = [item.component for item in found if item.fall > 0]
    torch.testing.assert_close(scores, (one.U[kept].t() @ one.V[kept]).detach() * (w @ C), atol=1e-5, rtol=1e-4)
    assert float(scores.sum()) == pytest.approx(sum(item.attribution for item in found if item.fall > 0), rel=1e-4)


def test_attribution_is_the_slope_to_the_masks(llama):
    """U' G V is the gradient with respect to a component's mask, the same at all tokens."""
    matrices, batch = block_matrices(llama), text(llama)
    target = LanguageTarget(llama, matrices, batch)
    made = Decomposition(matrices, DecompositionSettings(components=6)).requires_grad_(False)
    _, inputs = clean_run(target, batch)
    one = {name: torch.ones(6, requires_grad=True) for name in inputs}
    masks = Masks(
        {name: mask.expand(*inputs[name].shape[:-1], 6) for name, mask in one.items()},
        {name: torch.ones_like(x[..., :1]) for name, x in inputs.items()},
    )
    with masked(target.root, matrices, made, masks):
        slopes = torch.autograd.grad(target.outputs(batch)[:, 3].mean(), list(one.values()))
    weights = torch.autograd.grad(target.outputs(batch)[:, 3].mean(), [matrix.parameter for matrix in matrices])
    for matrix, gradient in zip(matrices, weights, strict=True):
        pieces = made.pieces(matrix.name)
        slope = slopes[list(one).index(matrix.name)]
        torch.testing.assert_close(((pieces.U @ gradient) * pieces.V).sum(dim=1), slope, atol=1e-5, rtol=1e-3)
