"""Sums over parts, located sets, random ones like them, differences, and edits that are undone bit for bit."""

import numpy as np
import pytest
import torch

from sae.behavior.cost import own_replies
from sae.behavior.measure import prepare, prepare_margins
from sae.errors import UserError
from sae.lm.matrices import Matrix, columns, rows, tensors
from sae.weights import differences, edit
from sae.weights.levels import LEVELS, aggregate, locate, matched, parts_of, sizes
from sae.weights.methods import PARAMETER_METHODS, Problem, Sides
from sae.weights.objective import margin_objective, passage_of, reply_objective


def some_scores(matrices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {one.name: torch.randn(one.parameter.shape, generator=generator) for one in matrices}


def test_a_part_scores_the_sum_of_its_weights(organism):
    scores = some_scores(organism.matrices)
    for level in LEVELS[1:]:
        parts = parts_of(organism.lm, organism.matrices, level)
        found = aggregate(scores, parts)
        for index in (0, len(parts) // 2, len(parts) - 1):
            expected = sum(float(one.of(scores[one.name]).double().sum()) for one in parts[index].slices)
            assert found[index] == pytest.approx(expected, abs=1e-5)
        assert sizes(parts[:1], organism.matrices)[0] == sum(
            one.of(scores[one.name]).numel() for one in parts[0].slices
        )
    for level in ("row", "column", "tensor"):  # each holds every weight once
        parts = parts_of(organism.lm, organism.matrices, level)
        assert aggregate(scores, parts).sum() == pytest.approx(
            sum(float(v.double().sum()) for v in scores.values()), abs=1e-3
        )


def test_pieces_of_matrices_are_named_as_their_weights_lie():
    """A row is an output and a column an input, however the matrix is stored."""
    matrices = [
        Matrix("a", 0, "q", torch.nn.Parameter(torch.zeros(2, 3)), 0),
        Matrix("b", 1, "q", torch.nn.Parameter(torch.zeros(3, 2)), 1),
    ]
    named = [[part.label for part in of(matrices)] for of in (rows, columns, tensors)]
    assert named[0] == ["a[0]", "a[1]", "b[0]", "b[1]"]
    assert named[1] == ["a[:,0]", "a[:,1]", "a[:,2]", "b[:,0]", "b[:,1]", "b[:,2]"]
    assert named[2] == ["a", "b"]
    assert [part.slices[0].axis for part in rows(matrices)[::2]] == [0, 1]
    assert sizes([*rows(matrices), *columns(matrices), *tensors(matrices)], matrices).tolist() == [
        *[3] * 4,
        *[2] * 6,
        *[6] * 2,
    ]
    assert [len({part.family for part in of(matrices)}) for of in (rows, columns, tensors)] == [2, 2, 2]


def test_the_best_weights_that_fit_are_located(organism):
    matrices = organism.matrices
    scores, total = some_scores(matrices), sum(one.parameter.numel() for one in matrices)
    for fraction in (1e-5, 0.003, 0.4):
        found = locate(scores, [], matrices, fraction)
        count = int(fraction * total)
        flat = torch.cat([scores[one.name].flatten() for one in matrices])
        threshold = flat.topk(count).values[-1]
        for one in matrices:
            marked = found.mask.get(one.name, torch.zeros_like(scores[one.name], dtype=torch.bool))
            assert torch.equal(marked, scores[one.name] >= threshold)
    assert edit.share_of(locate(scores, [], matrices, 1.0).mask, matrices) == pytest.approx(0.5, abs=0.01)  # positives
    tied = {name: torch.ones_like(values) for name, values in scores.items()}
    assert locate(tied, [], matrices, 0.01).mask == {}


def test_located_parts_fit_and_are_the_best(organism):
    parts = parts_of(organism.lm, organism.matrices, "head")
    scores = np.linspace(-1, 1, len(parts))
    found = locate(scores, parts, organism.matrices, 0.012)
    assert found.parts == (len(parts) - 1, len(parts) - 2)
    assert edit.share_of(found.mask, organism.matrices) <= 0.012
    assert len(locate(scores, parts, organism.matrices, 1e-9).parts) == 1


def test_random_sets_have_the_size_and_the_matrices_of_the_located_one(organism):
    for level in LEVELS:
        parts = parts_of(organism.lm, organism.matrices, level)
        scores = aggregate(some_scores(organism.matrices), parts) if parts else some_scores(organism.matrices)
        found = locate(scores, parts, organism.matrices, 0.05)
        drawn = [matched(found, parts, organism.matrices, seed) for seed in (0, 0, 1)]
        for mask in drawn:
            if level == "tensor":  # another matrix of its kind
                assert [name.split(".", 3)[3] for name in mask] == [name.split(".", 3)[3] for name in found.mask]
                assert not set(mask) & set(found.mask)
                continue
            assert mask.keys() == found.mask.keys()
            assert all(int(mask[name].sum()) == int(marked.sum()) for name, marked in found.mask.items())
            assert not any(bool((mask[name] & marked).any()) for name, marked in found.mask.items())
        same = [
            drawn[0].keys() == other.keys() and all(torch.equal(drawn[0][name], other[name]) for name in drawn[0])
            for other in drawn[1:]
        ]
        assert same == [True, False]


@pytest.mark.parametrize("mode", edit.MODES)
def test_edits_are_undone_bit_for_bit_whatever_happens(organism, mode):
    matrices = organism.matrices
    before = {one.name: one.parameter.detach().clone() for one in matrices}
    first = matrices[0]
    mask = {first.name: torch.rand(first.parameter.shape) < 0.5}
    reference = some_scores(matrices)
    expected = {"zero": 0.0, "mean": before[first.name].mean(), "restore": reference[first.name]}[mode]

    def cut():
        with edit.replaced(matrices, mask, mode, reference):
            torch.testing.assert_close(
                first.parameter.detach(), torch.where(mask[first.name], expected, before[first.name])
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    assert all(torch.equal(one.parameter, before[one.name]) for one in matrices)


def test_only_the_set_is_left_in_a_reference(organism):
    matrices = organism.matrices
    own, other = {one.name: one.parameter.detach().clone() for one in matrices}, some_scores(matrices)
    mask = {matrices[2].name: torch.rand(matrices[2].parameter.shape) < 0.5}
    with edit.only(matrices, mask, other):
        for one in matrices:
            kept = mask.get(one.name, torch.tensor(False))
            assert torch.equal(one.parameter.detach(), torch.where(kept, own[one.name], other[one.name]))
    with pytest.raises(UserError, match="restore"), edit.replaced(matrices, mask, "restore"):
        pass
    with pytest.raises(UserError, match="'cut'"), edit.replaced(matrices, mask, "cut"):
        pass


def test_set_difference_gives_the_published_set_at_every_threshold():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ({"w": torch.rand(6, 10, generator=generator)} for _ in range(2))
    found = differences.set_difference(ours, theirs, top=0.25)["w"].flatten()
    utility = set(theirs["w"].flatten().topk(15).indices.tolist())
    for count in (1, 10, 40):
        top = set(ours["w"].flatten().topk(count).indices.tolist())
        edge = 1 - (count - 0.5) / 60
        assert {i for i, value in enumerate(found.tolist()) if value > edge} == top - utility


def test_normalized_difference_of_parts_and_weights_agree():
    ours, theirs = (
        {"a": torch.tensor([[4.0, 0.0]]), "b": torch.tensor([[2.0, 2.0]])},
        {"a": torch.tensor([[-1.0, 1.0]]), "b": torch.zeros(1, 2)},
    )
    found = differences.normalized_difference(ours, theirs)
    torch.testing.assert_close(found["a"], torch.tensor([[0.0, -2.0]]))
    torch.testing.assert_close(found["b"], torch.tensor([[1.0, 1.0]]))
    parts = differences.part_normalized_difference(np.array([4.0, 0, 2, 2]), np.array([-1.0, 1, 0, 0]))
    assert parts.tolist() == [0.0, -2.0, 1.0, 1.0]


@pytest.mark.parametrize("method", ["taylor", "wanda", "act_svd"])
def test_both_sides_on_disk_give_what_they_give_in_memory(organism, method, tmp_path):
    lm, matrices, records = organism.lm, organism.matrices, organism.sets["refusal"]
    due, calm = records.positives[:4], records.negatives[:4]
    shown, other = (passage_of(own_replies(lm, prepare(lm, some), 4), lm.pad_id) for some in (due, calm))
    problem = Problem(
        lm, matrices, margin_objective(lm, due, matrices), reply_objective(lm, other, matrices), shown, other,
        prepare_margins(lm, due), scratch=tmp_path,
    )  # fmt: skip
    sides = Sides(method, problem)
    ours = dict(PARAMETER_METHODS[method](problem, "behavior"))
    expected = {method: ours}
    if method != "act_svd":
        theirs = dict(PARAMETER_METHODS[method](problem, "utility"))
        expected[f"{method}_set_difference"] = differences.set_difference(ours, theirs)
        expected[f"{method}_difference"] = differences.normalized_difference(ours, theirs)
    assert sides.variants == list(expected)
    for name, scores in expected.items():
        found = sides.scores(name)
        assert list(found) == list(scores)
        assert all(torch.equal(found[key], values) for key, values in scores.items())
    heads = parts_of(lm, matrices, "head")
    assert np.array_equal(sides.part_scores(method, heads), aggregate(ours, heads))
    a, b = locate(sides.scores(method), [], matrices, 0.01), locate(ours, [], matrices, 0.01)
    assert a.mask.keys() == b.mask.keys()
    assert all(torch.equal(a.mask[name], b.mask[name]) for name in a.mask)
    light = Sides(method, problem, weights=False)
    assert all(
        np.array_equal(light.part_scores(name, heads), sides.part_scores(name, heads)) for name in sides.variants
    )
