"""Low-rank blocks as parts: exact pieces of their matrices, perturbed along themselves alone, found where no row is."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.weights.perturbation.blocks import Blocks
from sae.weights.perturbation.registry import METHODS

N_PROMPTS = 5


class Linear:
    """Two matrices, one stored [in out]; a metric that is linear in both, with a gradient for each prompt."""

    def __init__(self, seed=0):
        source = torch.Generator().manual_seed(seed)
        shapes = {"a": (7, 5), "b": (6, 9)}
        self.weights = {name: nn.Parameter(torch.randn(shape, generator=source)) for name, shape in shapes.items()}
        self.slopes = {name: torch.randn(N_PROMPTS, *shape, generator=source) for name, shape in shapes.items()}
        self.start = {name: values.detach().clone() for name, values in self.weights.items()}
        self.matrices = [Matrix("a", 0, "", self.weights["a"], 0), Matrix("b", 1, "", self.weights["b"], 1)]
        self.layers = []

    def __call__(self):
        return sum(
            (self.slopes[name].double() * self.weights[name].detach().double()).sum(dim=(1, 2)) for name in self.weights
        ).numpy()

    def from_layer(self, layer):
        self.layers.append(layer)
        return self()

    def gradients(self):
        return {name: slope.mean(dim=0) for name, slope in self.slopes.items()}

    @property
    def untouched(self):
        return all(torch.equal(self.weights[name], self.start[name]) for name in self.weights)


def pieces(toy, rank):
    """Each matrix's U, S and V' in [out in], cut into blocks."""
    for matrix in toy.matrices:
        weight = toy.start[matrix.name] if matrix.out_axis == 0 else toy.start[matrix.name].T
        slope = toy.gradients()[matrix.name]
        slope = slope if matrix.out_axis == 0 else slope.T
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        for start in range(0, len(s) // rank * rank, rank):
            own = slice(start, start + rank)
            yield u[:, own], s[own], vt[own], slope


def run(method, toy, blocks, **options):
    if method == "gradient_directed":
        options["gradients"] = blocks.gradients(toy.gradients)
    return METHODS[method](blocks.metric(toy), blocks.matrices, blocks.parts, **options)


def test_blocks_are_exact_pieces_and_their_removal_takes_nothing_else():
    toy = Linear()
    blocks = Blocks(toy.matrices, rank=2, n_blocks=9)
    assert [part.label for part in blocks.parts] == ["a{1-2}", "a{3-4}", "b{1-2}", "b{3-4}", "b{5-6}"]
    expected = [float(((u * s) @ vt * slope).sum()) for u, s, vt, slope in pieces(toy, 2)]
    found = run("adaptive", toy, blocks, budget=100)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert toy.layers  # started behind what has not changed
    assert toy.untouched
    for part, (u, s, vt, _) in zip(blocks.parts, pieces(toy, 2), strict=True):
        total = sum(one.gain * torch.outer(one.out, one.into) for one in blocks.directions(part))
        torch.testing.assert_close(total, (u * s) @ vt)
    assert blocks.values() == {}
    assert len(Blocks(toy.matrices, rank=2, n_blocks=1).parts) == 2
    assert [len(blocks.parts) for blocks in (Blocks(toy.matrices, rank=50), Blocks(toy.matrices, rank=5))] == [2, 2]
    with pytest.raises(UserError, match="0 blocks"):
        Blocks(toy.matrices, n_blocks=0)


def test_noise_stays_along_the_block():
    toy, moved = Linear(), []
    blocks = Blocks(toy.matrices, rank=2)

    def metric():
        moved.append({name: values.detach() - toy.start[name] for name, values in toy.weights.items()})
        return toy()

    METHODS["random"](blocks.metric(metric), blocks.matrices, blocks.parts, budget=11)
    for change in moved[1:]:
        along = []
        for (u, _, vt, _), name, axis in zip(pieces(toy, 2), "aabbb", (0, 0, 1, 1, 1), strict=True):
            own = change[name] if axis == 0 else change[name].T
            rest = own - u @ (u.T @ own @ vt.T) @ vt
            along.append(float(own.norm()) > 0.01 and float(rest.norm()) < 1e-5)
        assert sum(along) == 1
    assert toy.untouched


def test_random_and_directed_estimates_are_those_of_the_projected_gradient():
    toy, relative = Linear(), 0.3
    blocks = Blocks(toy.matrices, rank=2)
    sizes = {one.name: relative * float(one.parameter.square().mean().sqrt()) for one in blocks.matrices}
    own = np.array([sizes[part.slices[0].name] for part in blocks.parts])
    norms = np.array([float((u.T @ slope @ vt.T).norm()) for u, _, vt, slope in pieces(toy, 2)])
    found = run("random", toy, blocks, budget=6001, relative=relative)
    assert (np.abs(found.scores - (own * norms) ** 2) < 4 * found.errors).all()
    assert (found.errors < 0.3 * found.scores).all()
    directed = run("gradient_directed", toy, blocks, budget=50, relative=relative)
    np.testing.assert_allclose(directed.scores, own * math.sqrt(4) * norms, rtol=1e-3)
    np.testing.assert_allclose(directed.detail["promised"], directed.scores, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_blocks_and_weights_are_put_back_when_it_fails(method):
    toy = Linear()
    found = run(method, toy, Blocks(toy.matrices, rank=2), budget=40)
    assert np.isfinite(found.scores).all()
    assert toy.untouched
    evaluations = 0

    def failing():
        nonlocal evaluations
        evaluations += 1
        if evaluations == 3:
            assert not toy.untouched
            raise RuntimeError("out of memory")
        return toy()

    blocks = Blocks(toy.matrices, rank=2)
    options = {"gradients": blocks.gradients(toy.gradients)} if method == "gradient_directed" else {}
    with pytest.raises(RuntimeError, match="out of memory"):
        METHODS[method](blocks.metric(failing), blocks.matrices, blocks.parts, budget=40, **options)
    assert toy.untouched


def test_a_direction_that_no_row_holds_is_one_block():
    """A rank-one piece spread over all rows and columns: its block carries the metric, no row much of it."""
    source = torch.Generator().manual_seed(2)
    u, v = (torch.nn.functional.normalize(torch.randn(64, generator=source), dim=0) for _ in range(2))
    weight = nn.Parameter(0.1 * torch.randn(64, 64, generator=source) + 3.0 * torch.outer(u, v))
    (matrix,) = matrices = [Matrix("w", 0, "", weight, 0)]

    def metric():
        return np.full(3, float(u @ weight.detach() @ v))

    blocks = Blocks(matrices, rank=1, n_blocks=16)
    found = METHODS["adaptive"](blocks.metric(metric), blocks.matrices, blocks.parts, budget=200)
    whole = metric()[0]
    assert found.scores.argmax() == 0
    assert found.scores[0] > 0.9 * whole
    rows = (torch.outer(u, v) * matrix.parameter.detach()).sum(dim=1)
    assert float(rows.max()) < 0.2 * whole
