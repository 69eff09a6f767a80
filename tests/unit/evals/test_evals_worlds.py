"""Synthetic worlds do what they say: rates, amounts, correlation, hierarchy; and their streams resume exactly."""

import dataclasses
import json
import math

import pytest
import torch
from scipy.stats import multivariate_normal

from sae.autoencoder.sae import unit_rows
from sae.errors import UserError
from sae.evals.ground_truth import cosines, mcc
from sae.evals.world import HOOK_NAME, Copula, Tree, World
from sae.evals.worlds import (
    WORLDS,
    absorption,
    orthonormal,
    random_correlations,
    spread,
    t1,
    t2,
    t3,
    t4,
    zipf,
)
from sae.train.interfaces import Stream

SIGMAS = 5  # chance fails one comparison in 1.7 million; each test below makes at most a few thousand
SMALL = [t1, t2, t3, t4, absorption]
N = 65_536


def truth(world, n=N, seed=0):
    """Amounts of every feature on held-out tokens, [n n_features]."""
    return torch.cat([sample.feature_acts for sample in world.held_out(n // 4096, 4096, seed)])


def assert_rates(fires, p):
    """Booleans [n ...] fire at the rates p, up to the sampling error of a binomial."""
    n, p = len(fires), torch.as_tensor(p).double()
    off = (fires.double().mean(0) - p).abs()
    assert (off <= SIGMAS * (p * (1 - p) / n).sqrt() + 1e-9).all(), (off / (p * (1 - p) / n).sqrt()).max()


def world_of(p, **more):
    """A small world of features at right angles."""
    n = len(p)
    return World("toy", orthonormal(n, n + 2, seed=0), p, torch.ones(n), torch.full((n,), 0.1), **more)


# What the named worlds are


def test_t1_is_as_named():
    world = t1()
    amounts = truth(world)
    assert (world.n_features, world.d_in) == (16, 32)
    assert_rates(amounts > 0, torch.full((16,), 0.25))
    here = amounts[amounts > 0].double()
    assert float(here.mean()) == pytest.approx(1, abs=SIGMAS * 0.05 / math.sqrt(len(here)))
    assert float(here.std()) == pytest.approx(0.05, abs=SIGMAS * 0.05 / math.sqrt(2 * len(here)))
    assert float((amounts > 0).sum(1).double().mean()) == pytest.approx(4, abs=SIGMAS * math.sqrt(3 / N))


def test_t2_children_fire_within_their_parent_only():
    world = t2()
    fires = truth(world) > 0
    assert (world.n_features, world.d_in) == (32, 28)
    # An amount of N(1, .3^2) is below 0, and then counts as silence, in 4 cases of 10,000.
    p = zipf(32, 1.2, 0.25, 0.01).double() * torch.special.ndtr(torch.tensor(1 / 0.3, dtype=torch.float64))
    p[1:8] *= p[0]
    assert_rates(fires, p)
    assert not (fires[:, 1:8] & ~fires[:, :1]).any()
    assert float(p.sum()) == pytest.approx(0.677, abs=0.001)  # as SAELens' tutorial has it: .68
    assert float(world.max_cosines().mean()) == pytest.approx(0.13, abs=0.01)


def test_t3_is_correlated_and_has_11_features_on_a_token():
    world = t3()
    p = torch.tensor([0.345 * (50 - i) / 50 + 0.05 for i in range(1, 51)])
    assert torch.allclose(world.p, p)
    assert float(p.sum()) == pytest.approx(10.95, abs=0.01)
    assert_rates(truth(world) > 0, p)
    correlation = world.copula.matrix()
    off = correlation[~torch.eye(50, dtype=torch.bool)]
    assert float(off.square().mean().sqrt()) == pytest.approx(0.165, abs=0.01)  # SAELens' with its seed 42: .166
    assert 0.45 < float((off > 0).double().mean()) < 0.55


def test_t4_is_synth_sae_bench_in_small():
    world = t4()
    amounts = truth(world)
    l0 = (amounts > 0).sum(1).double()
    # 2.9166 (deviation 2.69) in 512,000 samples of SAELens 6.54.
    assert float(l0.mean()) == pytest.approx(2.9166, abs=SIGMAS * 2.69 * math.sqrt(1 / N + 1 / 512_000))
    assert float(world.max_cosines().mean()) == pytest.approx(0.3426, abs=1e-3)
    assert float(world.bias.norm()) == pytest.approx(0.5)
    levels = world.tree.levels()
    assert [len(features) for features, _ in levels] == [2 + 86, 8, 32, 128]


def test_absorption_world_nests_feature_1_in_feature_0():
    fires = truth(absorption()) > 0
    assert_rates(fires, [0.2, 0.04, 0.2, 0.2])
    assert not (fires[:, 1] & ~fires[:, 0]).any()


def test_hierarchy_of_the_16k_benchmark_covers_10880_features():
    tree = Tree.forest(16_384, 128, branching=4, depth=3)
    levels = tree.levels()
    assert [len(features) for features, _ in levels] == [128 + 5504, 512, 2048, 8192]
    assert tree.parent[128:132].tolist() == [0] * 4
    assert tree.parent[640:644].tolist() == [128] * 4
    assert torch.bincount(tree.parent[tree.parent >= 0]).eq(4).all()
    assert int(tree.exclusive.sum()) == 128 + 512 + 2048
    assert tree.scaled


def test_forest_that_runs_out_of_features():
    tree = Tree.forest(9, 2, branching=4, depth=3)
    assert tree.parent.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1]
    assert Tree.forest(3, 5, branching=4, depth=1).parent.tolist() == [-1] * 3


def test_probabilities_are_raised_for_what_the_hierarchy_takes():
    """As SAELens does it: by 1 / p of the parent, and by 1 + the siblings' expected number where they exclude."""
    base, world = zipf(256, 0.5, 0.4, 5e-4), t4()
    expected = base.clone()
    for feature, parent in enumerate(world.tree.parent.tolist()):
        if parent >= 0:
            siblings = base[world.tree.parent == parent].sum() - base[feature]
            expected[feature] = min(1.0, float(base[feature] / base[parent] * (1 + siblings / base[parent])))
    assert torch.allclose(world.p, expected, atol=1e-6)


# What a world is made of


def test_zipf_runs_from_highest_to_lowest():
    p = zipf(100, 1.2, 0.25, 0.01)
    assert float(p[0]) == pytest.approx(0.25)
    assert float(p[-1]) == pytest.approx(0.01)
    middle = (p[[2, 9]] - 0.01) / 0.24 * (1 - 100**-1.2) + 100**-1.2
    assert middle.tolist() == pytest.approx([3**-1.2, 10**-1.2])


def test_directions_are_at_right_angles():
    rows = orthonormal(16, 32, seed=7)
    assert torch.allclose(rows @ rows.T, torch.eye(16), atol=1e-5)


def test_spread_moves_directions_apart_as_the_whole_objective_says():
    """The objective by its definition, through autograd over all pairs, takes the same path."""
    n, d, lr, n_steps = 24, 8, 0.01, 30
    start = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    rows = (start / start.norm(dim=1, keepdim=True)).requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=lr)
    for _ in range(n_steps):
        optimiser.zero_grad()
        products = rows @ rows.T
        own = products.diag()
        (products.square().sum() - own.square().sum() + n * (own - 1).square().sum()).backward()
        optimiser.step()
    expected = (rows / rows.norm(dim=1, keepdim=True)).detach()
    found = spread(n, d, torch.Generator().manual_seed(0), n_steps, lr)
    assert torch.allclose(found, expected, atol=1e-4)

    def crowding(v):
        return float((v @ v.T).square().sum())

    assert crowding(found) < 0.9 * crowding(start / start.norm(dim=1, keepdim=True))


def test_drawn_correlations_are_as_many_and_as_strong_as_said():
    drawn = random_correlations(50, seed=1)
    off = drawn[torch.triu(torch.ones(50, 50), diagonal=1).bool()]
    some = off[off != 0]
    assert len(some) == 1225 - 367
    assert int((some > 0).sum()) == 429
    assert float(some.abs().min()) >= 0.3
    assert float(some.abs().max()) <= 0.9
    assert torch.equal(drawn, drawn.T)


def test_a_copula_keeps_a_proper_matrix_and_repairs_an_improper_one():
    proper = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.0]])
    assert torch.allclose(Copula.of(proper).matrix(), proper.double(), atol=1e-6)
    improper = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    repaired = Copula.of(improper).matrix()
    assert torch.allclose(repaired.diag(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert float(torch.linalg.eigvalsh(repaired).min()) > -1e-6
    assert torch.equal(repaired.sign(), improper.double().sign())


def test_a_low_rank_copula_has_unit_variance_even_where_rows_were_too_long():
    copula = Copula.low_rank(200, 5, 0.4, seed=0)
    assert float(copula.factor.square().sum(1).max()) == pytest.approx(0.99, abs=1e-5)
    assert torch.allclose(copula.matrix().diag(), torch.ones(200, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("low_rank", [False, True])
def test_pairs_fire_together_as_often_as_the_correlation_says(low_rank):
    """P(both) is the probability of a quadrant of the bivariate normal."""
    p = torch.linspace(0.1, 0.4, 12)
    copula = Copula.low_rank(12, 3, 0.5, seed=2) if low_rank else Copula.of(random_correlations(12, seed=3))
    fires = truth(world_of(p, copula=copula)) > 0
    assert_rates(fires, p)
    correlation = copula.matrix()
    assert float((correlation - torch.eye(12)).abs().max()) > 0.3
    limits = torch.special.ndtri(p.double())
    for i in range(12):
        for j in range(i):
            covariance = [[1, float(correlation[i, j])], [float(correlation[i, j]), 1]]
            both = float(multivariate_normal.cdf([float(limits[i]), float(limits[j])], cov=covariance))
            assert_rates(fires[:, i] & fires[:, j], both)


def test_children_that_exclude_each_other_win_equally_often():
    """All want to fire on every token: exactly one child does, and of a loser no grandchild."""
    parent = torch.tensor([-1, 0, 0, 0, 0, 1, 2])
    exclusive = torch.tensor([True, False, False, False, False, False, False])
    fires = truth(world_of(torch.ones(7), tree=Tree(parent, exclusive))) > 0
    assert (fires[:, 1:5].sum(1) == 1).all()
    assert_rates(fires, [1.0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25])
    assert torch.equal(fires[:, 5:], fires[:, 1:3])


def test_children_that_do_not_exclude_each_other_fire_on_their_own():
    parent = torch.tensor([-1, 0, 0, 1])
    fires = truth(world_of(torch.tensor([0.5, 0.6, 0.4, 0.5]), tree=Tree(parent, torch.zeros(4, dtype=bool)))) > 0
    assert_rates(fires, [0.5, 0.3, 0.2, 0.15])
    assert_rates(fires[:, 1] & fires[:, 2], 0.12)


def test_scaled_children_follow_the_amount_of_their_parent():
    n, tree = 3, Tree(torch.tensor([-1, 0, 1]), torch.zeros(3, dtype=bool), scaled=True)
    mean, std = torch.tensor([5.0, 4.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    amounts = truth(World("toy", orthonormal(n, 4, seed=0), torch.ones(n), mean, std, tree=tree))
    factor = amounts[:, 0] / 5
    assert torch.allclose(amounts[:, 1], 4 * factor, atol=1e-5)
    # A grandchild is scaled by its parent as that was scaled by its own.
    assert torch.allclose(amounts[:, 2], 3 * factor, atol=1e-5)


def test_t4_never_breaks_its_hierarchy():
    world = t4()
    fires = truth(world) > 0
    children = (world.tree.parent >= 0).nonzero().squeeze(1)
    assert not (fires[:, children] & ~fires[:, world.tree.parent[children]]).any()
    per_parent = torch.zeros(N, 256).index_add_(1, world.tree.parent[children], fires[:, children].float())
    assert float(per_parent.max()) == 1


def test_activations_are_the_sum_of_what_fires():
    for build in SMALL:
        world = build()
        (sample,) = world.held_out(1, 512)
        expected = sample.feature_acts @ world.directions + (0 if world.bias is None else world.bias)
        assert torch.allclose(sample.acts, expected, atol=1e-4), world.name
        assert float(world.directions.norm(dim=1).sub(1).abs().max()) < 1e-5


def test_noise_is_added_to_every_coordinate():
    world = dataclasses.replace(t1(), noise=0.5)
    (sample,) = world.held_out(1, 8192)
    noise = (sample.acts - sample.feature_acts @ world.directions).double()
    assert float(noise.std()) == pytest.approx(0.5, abs=SIGMAS * 0.5 / math.sqrt(2 * noise.numel()))


def test_a_world_where_nothing_fires_gives_its_bias():
    world = world_of(torch.zeros(4), tree=Tree.of(4, {0: [1]}), bias=torch.arange(6.0))
    (sample,) = world.held_out(1, 8)
    assert torch.equal(sample.acts, torch.arange(6.0).expand(8, 6))
    assert not sample.feature_acts.any()


# Streams


@pytest.mark.parametrize("build", SMALL)
def test_a_batch_depends_on_its_number_and_the_seed_alone(build):
    world = build()
    stream = world.stream(32, seed=3)
    assert isinstance(stream, Stream)
    before = torch.get_rng_state()
    batches = [stream.next_batch().acts[HOOK_NAME] for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    state = json.loads(json.dumps(stream.state_dict()))
    last = stream.next_batch().acts[HOOK_NAME]

    again = build().stream(32, seed=3)
    again.load_state_dict(state)
    assert torch.equal(again.next_batch().acts[HOOK_NAME], last)
    again.load_state_dict({"number": 1})
    assert torch.equal(again.next_batch().acts[HOOK_NAME], batches[1])

    assert batches[0].shape == (32, world.d_in)
    assert stream.d_in == {HOOK_NAME: world.d_in}
    for other in (*batches[1:], world.stream(32, seed=4).next_batch().acts[HOOK_NAME]):
        assert not torch.equal(other, batches[0])


def test_streams_and_samples_draw_alike_but_hold_no_token_in_common():
    world = t4()
    one = world.acts(64, torch.Generator().manual_seed(5))
    assert torch.equal(world.sample(64, torch.Generator().manual_seed(5)).acts, one)
    stream = world.stream(64, seed=0)
    trained = {tuple(row) for _ in range(20) for row in stream.next_batch().acts[HOOK_NAME].tolist()}
    held_out = {tuple(row) for sample in world.held_out(20, 64, seed=0) for row in sample.acts.tolist()}
    silent = tuple(world.bias.tolist())  # a token on which nothing fires is the same everywhere
    assert trained & held_out <= {silent}


def test_the_fingerprint_tells_worlds_and_seeds_apart():
    prints = {build().fingerprint for build in SMALL}
    assert len(prints) == len(SMALL)
    assert t1().fingerprint == t1().fingerprint
    assert dataclasses.replace(t1(), noise=0.1).fingerprint not in prints
    assert t3(seed=1).fingerprint != t3(seed=2).fingerprint
    assert t1().stream(8, seed=0).fingerprint != t1().stream(8, seed=1).fingerprint


def test_names_lead_to_worlds():
    assert all(WORLDS[build.__name__]().name == build.__name__ for build in SMALL)
    assert "synth_sae_bench_16k" in WORLDS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device.")
def test_a_world_on_a_gpu_has_the_same_statistics():
    here, there = t4(), t4().to("cuda")
    rates = [(truth(world) > 0).double().mean(0).cpu() for world in (here, there)]
    error = (2 * rates[0] * (1 - rates[0]) / N).sqrt() + 1e-4
    assert float(((rates[0] - rates[1]).abs() / error).max()) < SIGMAS
    stream = there.stream(16)
    assert torch.equal(stream.next_batch().acts[HOOK_NAME], there.stream(16).next_batch().acts[HOOK_NAME])


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.full((15,), 0.1)}, r"p of world 't1' has shape \[15\]"),
        ({"p": torch.full((16,), 1.5)}, r"p in \[0, 1\]"),
        ({"std": torch.full((16,), -1.0)}, "std of 0 or more"),
        ({"noise": -1.0}, "noise of 0 or more"),
        ({"directions": torch.ones(16, 32)}, "norm 1"),
        ({"bias": torch.zeros(16)}, r"bias of world 't1' has shape \[16\]"),
        ({"copula": Copula.low_rank(8, 2, 0.1, 0)}, "copula.factor"),
        ({"tree": Tree.of(8, {0: [1]})}, "tree.parent"),
        ({"tree": Tree.of(16, {3: [1]})}, "lower index"),
        ({"tree": Tree.forest(16, 2, 4, 1), "mean": torch.zeros(16)}, "mean above 0"),
    ],
)
def test_worlds_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(t1(), **change)


def test_other_mistakes():
    with pytest.raises(UserError, match="symmetric"):
        Copula.of(torch.tensor([[1.0, 0.5], [0.2, 1.0]]))
    with pytest.raises(UserError, match="ones on its diagonal"):
        Copula.of(2 * torch.eye(2))
    with pytest.raises(UserError, match="batch_tokens = 0"):
        t1().stream(0)
    with pytest.raises(UserError, match="batch_tokens = 0"):
        next(t1().held_out(1, 0))


def test_no_sae_of_a_usual_seed_begins_with_the_truth():
    """The highest of 40 is the median and a little, as chance has it; with a world's own seed it would be .9."""
    for build in (t1, t2, t3, t4):
        world = build()
        d_sae = min(world.n_features, 64)
        rows = (unit_rows(d_sae, world.d_in, torch.Generator().manual_seed(seed)) for seed in range(40))
        scores = sorted(mcc(cosines(first, world.directions)) for first in rows)
        assert scores[-1] < scores[20] + 0.06, (world.name, scores[20], scores[-1])
