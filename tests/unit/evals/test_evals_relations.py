"""SAEs related to each other: permutations are undone, planted novelty is found, and chance is measured."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.autoencoder.sae import SAE, SAEConfig, unit_rows
from sae.errors import UserError
from sae.evals.reconstruction import ReconstructionMeter
from sae.evals.relations import Tree, directions, families, match, null_similarity, seed_stability, stitching

D_IN = 32


def rows(n, seed=0, d=D_IN):
    return unit_rows(n, d, torch.Generator().manual_seed(seed))


def make(W_dec, W_enc=None, hook_name="h", b_dec=None):
    sae = SAE(SAEConfig("relu", W_dec.shape[1], len(W_dec), 0.0, 0, hook_name, "toy"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.t() if W_enc is None else W_enc)
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
    return sae


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), extra=st.integers(0, 20), seed=st.integers(0, 99), greedy=st.booleans())
def test_permuted_latents_find_themselves(n, extra, seed, greedy):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n + extra, generator=generator)
    one = rows(n, seed)
    other = torch.cat([one, rows(extra, seed + 1)])[order]
    method = "greedy" if greedy else "hungarian"
    # Lengths do not matter.
    found = match(make(one), make(3 * other, other.t() / 2), method=method)
    assert torch.equal(order[found.partner], torch.arange(n))
    assert torch.equal(found.best.row, found.partner)
    assert found.mean == pytest.approx(1, abs=1e-5)
    assert found.shared == 1
    assert found.method == method
    back = match(make(other), make(one), method=method)
    assert (back.partner >= 0).sum() == n
    assert torch.equal(back.similarity.isnan(), back.partner < 0)
    assert back.shared == pytest.approx(n / (n + extra))


def test_identical_and_opposite():
    sae = make(rows(50))
    same = match(sae, sae)
    assert same.partner.tolist() == list(range(50))
    assert same.similarity.tolist() == pytest.approx([1.0] * 50)
    assert same.method == "hungarian"
    opposite = match(sae, make(-rows(50)))
    assert opposite.similarity.max() < 0.9
    assert opposite.shared < 0.2
    files.to_plain(same)


def test_both_is_the_mean_of_the_two_cosines():
    a, b = make(rows(9, 1), rows(9, 2).t()), make(rows(7, 3), rows(7, 4).t())
    products = {by: directions(a, by) @ directions(b, by).t() for by in ("decoder", "encoder", "both")}
    assert torch.allclose(products["both"], (products["decoder"] + products["encoder"]) / 2, atol=1e-6)
    assert torch.allclose(products["encoder"], rows(9, 2) @ rows(7, 4).t(), atol=1e-6)
    # The same decoder with an unrelated encoder: .5 by both.
    half = match(make(rows(9, 1)), make(rows(9, 1), torch.zeros(D_IN, 9)))
    assert half.mean == pytest.approx(0.5)
    with pytest.raises(UserError, match="way to compare latents"):
        match(a, b, by="logits")


def test_unrelated_dictionaries_are_as_alike_as_chance():
    found = match(make(rows(300, 1)), make(rows(300, 2)), seed=5)
    assert float(found.best.cosine.mean()) == pytest.approx(found.null.best_mean, abs=0.02)
    assert found.mean == pytest.approx(found.null.matched_mean, abs=0.02)
    assert found.null.best_mean < found.null.best_high
    assert found.null.matched_mean < found.null.best_mean
    # Rows that keep to 4 of 32 dimensions are alike; only the null that knows of it says so.
    flat = [torch.nn.functional.pad(rows(300, seed, 4), (0, D_IN - 4)) for seed in (1, 2)]
    shape = {null: match(make(flat[0]), make(flat[1]), null=null).null for null in ("sphere", "data")}
    best = float(match(make(flat[0]), make(flat[1])).best.cosine.mean())
    assert best > shape["sphere"].best_mean + 0.2
    assert best == pytest.approx(shape["data"].best_mean, abs=0.02)
    with pytest.raises(UserError, match="kind of random rows"):
        null_similarity(make(rows(3)), make(rows(3)), None, "cube")


def test_seed_stability():
    shared = rows(20, 0)
    saes = [make(torch.cat([shared, rows(20, seed)])) for seed in (1, 2, 3)]
    found = seed_stability(saes)
    for stability, mean in zip(found.stability, found.mean, strict=True):
        assert stability[:20].tolist() == pytest.approx([1.0] * 20)
        assert stability[20:].max() < 0.9
        assert mean == pytest.approx(float(stability.mean()))
    expected = (saes[0].W_dec @ saes[1].W_dec.t()).max(1).values + (saes[0].W_dec @ saes[2].W_dec.t()).max(1).values
    assert torch.allclose(found.stability[0], expected.detach() / 2, atol=1e-5)
    with pytest.raises(UserError, match="1 SAE"):
        seed_stability(saes[:1])


def sparse_world(n=4000, seed=0):
    """Activations made of 24 orthonormal directions, and their mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D_IN, 24, generator=generator))[0].t()
    z = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.2)
    return basis, z @ basis + 7


def test_planted_novelty():
    """The wide SAE has the narrow one's latents and new ones: exactly these are novel, and only they help."""
    basis, x = sparse_world()
    b_dec = torch.full((D_IN,), 7.0)
    small, large = make(basis[:16], b_dec=b_dec), make(basis, b_dec=b_dec)
    found = stitching(small, large, x.split(999))
    assert torch.equal(found.is_novel, torch.arange(24) >= 16)
    assert found.cosine[:16].tolist() == pytest.approx([1.0] * 16)
    assert found.cosine[16:].abs().max() < 1e-5
    assert (found.change[16:] < 0).all()
    assert (found.change[:16] > 0).all()
    assert found.auroc == 1
    assert (found.novel.n, found.novel.improving) == (8, 1)
    assert (found.reconstruction.n, found.reconstruction.improving) == (16, 0)
    assert found.novel.fvu == pytest.approx(0, abs=1e-5)
    assert found.fvu_large == pytest.approx(0, abs=1e-5)
    assert found.reconstruction.change > 0
    # What is orthogonal adds up.
    assert found.novel.change == pytest.approx(float(found.change[16:].sum()), abs=1e-5)
    assert found.n_tokens == 4000
    files.to_plain(found)


def test_numbers_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, D_IN, generator=generator) + 30
    small, large = make(rows(10, 1), b_dec=x.mean(0)), make(2 * rows(30, 2), rows(30, 4).t(), b_dec=x.mean(0) + 1)
    found = stitching(small, large, x.split(77), threshold=0.3)
    for sae, fvu in ((small, found.fvu_small), (large, found.fvu_large)):
        meter = ReconstructionMeter(sae)
        meter.update(x)
        assert fvu == pytest.approx(meter.result().fvu, rel=1e-5)
    variation = (x - x.mean(0)).double().square().sum()
    error, z = (x - small(x).recons).detach(), large.encode(x).detach()

    def fvu_with(chosen):
        return float((error - z[:, chosen] @ large.W_dec.detach()[chosen]).double().square().sum() / variation)

    assert found.novel.n + found.reconstruction.n == 30
    assert found.novel.fvu == pytest.approx(fvu_with(found.is_novel), rel=1e-5)
    assert found.reconstruction.change == pytest.approx(fvu_with(~found.is_novel) - found.fvu_small, rel=1e-4)
    alone = [fvu_with([j]) - found.fvu_small for j in range(30)]
    assert found.change.tolist() == pytest.approx(alone, abs=1e-6)


def test_latents_that_never_fire_are_in_no_group():
    basis, x = sparse_world()
    large = make(basis, b_dec=torch.full((D_IN,), 7.0))
    with torch.no_grad():
        large.b_enc[20:] = -1e9
    found = stitching(make(basis[:16], b_dec=torch.full((D_IN,), 7.0)), large, [x])
    assert found.fired.tolist() == [True] * 20 + [False] * 4
    assert found.is_novel.nonzero()[:, 0].tolist() == [16, 17, 18, 19]
    assert found.change[20:].tolist() == [0] * 4


def test_families_follow_the_splits():
    """Two parents of 2 and 3 children; one child of 2; one newcomer below the floor."""
    base = torch.eye(D_IN)
    parents = base[:2]

    def near(direction, axis):
        return (direction + 0.3 * base[axis]) / 1.09**0.5

    middle = torch.stack([near(parents[1], 5), near(parents[0], 6), near(parents[1], 7), near(parents[0], 8), base[20]])
    wide = torch.stack([near(middle[1], 10), middle[4], near(middle[1], 11), middle[0], middle[2], middle[3]])
    found = families([make(wide), make(parents), make(middle)])
    assert [level.d_sae for level in found.levels] == [2, 5, 6]
    assert found.levels[1].parent.tolist() == [1, 0, 1, 0, -1]
    assert found.levels[2].parent.tolist() == [1, 4, 1, 0, 2, 3]
    assert found.children(0, 0) == [1, 3]
    assert found.children(2, 0) == []
    assert (found.roots(0), found.roots(1), found.roots(2)) == ([0, 1], [4], [])
    tree = found.tree(0, 0)
    assert [child.latent for child in tree.children] == [1, 3]
    assert [child.latent for child in tree.children[0].children] == [0, 2]
    assert tree.children[0].cosine == pytest.approx(1 / 1.09**0.5)
    assert isinstance(tree.children[1].children[0], Tree)
    assert files.to_plain(tree)["children"][1]["children"][0]["latent"] == 5
    assert files.to_plain(found)["floor"] == 0.5
    with pytest.raises(UserError, match="different width"):
        families([make(wide), make(wide)])


def test_unlike_saes_are_refused():
    one = make(rows(5))
    for other in (make(rows(5), hook_name="elsewhere"), make(rows(5, d=D_IN + 1))):
        for call in (match, lambda a, b: families([a, b]), lambda a, b: stitching(a, b, [])):
            with pytest.raises(UserError, match="no directions in common"):
                call(one, other)
    with pytest.raises(UserError, match="without variance"):
        stitching(one, make(rows(9)), [torch.ones(3, D_IN)])
    with pytest.raises(UserError, match="without variance"):
        stitching(one, make(rows(9)), [])
