"""The worlds that SAEs are judged in, by name.

`synth_sae_bench_16k` follows the published configuration of SynthSAEBench-16k (2602.14687, version 2 of the model).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import unit_rows
from sae.evals.world import Copula, Tree, World


def orthonormal(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw directions at right angles to each other; n is at most d."""
    assert n <= d, "no more directions than dimensions are at right angles"
    rows = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(rows).Q.T.contiguous()


def spread(n: int, d: int, generator: torch.Generator, n_steps: int, lr: float) -> Float[Tensor, "n d"]:
    """Draw directions and move them apart by some steps of Adam.

    They descend sum_{i != j} (v_i . v_j)^2 + n sum_i (|v_i|^2 - 1)^2. As the first sum is |V^T V|^2 - sum_i |v_i|^4,
    a step takes n d^2 operations and not n^2 d.
    """
    rows = unit_rows(n, d, generator)
    optimiser = torch.optim.Adam([rows], lr=lr)
    for _ in range(n_steps):
        square = rows.square().sum(1, keepdim=True)
        rows.grad = rows @ (rows.T @ rows) + (n * (square - 1) - square) * rows
        optimiser.step()
    return rows / rows.norm(dim=1, keepdim=True)


def zipf(n: int, exponent: float, highest: float, lowest: float) -> Float[Tensor, " n"]:
    """Probabilities that fall as rank^-exponent, stretched to run from `highest` to `lowest`."""
    falling = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    return (lowest + (highest - lowest) * (falling - falling[-1]) / (1 - falling[-1])).float()


def random_correlations(n: int, seed: int) -> Float[Tensor, "n n"]:
    """Correlations as in 2508.16560: 30% of pairs have none, the others one of size .3 to .9, half of them positive.

    As drawn this is no correlation matrix; `Copula.of` makes the nearest thing, in which most are much weaker.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.triu_indices(n, n, offset=1)
    n_correlated = len(rows) - int(0.3 * len(rows))
    values = torch.zeros(len(rows))
    values[:n_correlated] = 0.3 + 0.6 * torch.rand(n_correlated, generator=generator)
    values[: n_correlated // 2] *= -1
    matrix = torch.eye(n)
    matrix[rows, cols] = values[torch.randperm(len(rows), generator=generator)]
    return torch.triu(matrix) + torch.triu(matrix, diagonal=1).T


def t1() -> World:
    """16 features at right angles in 32 dimensions, each on a quarter of tokens, of nearly one size."""
    return World("t1", orthonormal(16, 32, seed=1), torch.full((16,), 0.25), torch.ones(16), torch.full((16,), 0.05))


def t2() -> World:
    """32 features of unequal frequency in 28 dimensions; features 1 to 7 fire only where feature 0 does."""
    # SAEs draw their first rows as this does: from a seed of theirs, one would begin with the truth.
    directions = spread(32, 28, torch.Generator().manual_seed(2_002), n_steps=200, lr=0.01)
    tree = Tree.of(32, {0: list(range(1, 8))})
    return World("t2", directions, zipf(32, 1.2, 0.25, 0.01), torch.ones(32), torch.full((32,), 0.3), tree=tree)


def t3(seed: int = 42) -> World:
    """The world of "Sparse but wrong" (2508.16560): 50 correlated features at right angles, 11 of them on a token.

    An SAE that fires fewer latents mixes correlated features into each; one that fires more finds other mixtures, and
    reconstructs better for it.

    Args:
        seed: of the correlations.
    """
    p = 0.345 * torch.arange(49, -1, -1) / 50 + 0.05
    copula = Copula.of(random_correlations(50, seed))
    return World("t3", orthonormal(50, 100, seed=3), p, torch.ones(50), torch.full((50,), 0.15), copula=copula)


def t4() -> World:
    """SynthSAEBench in small: 256 features in 64 dimensions, 2 trees; 2.9 features on a token."""
    return synth_sae_bench("t4", 256, 64, n_roots=2)


def synth_sae_bench_16k() -> World:
    """SynthSAEBench-16k: 16,384 features in 768 dimensions, 128 trees. Building it takes about a minute.

    The published model was drawn on a GPU: it has the same distribution, but other directions.
    """
    return synth_sae_bench("synth_sae_bench_16k", 16_384, 768, n_roots=128)


def absorption() -> World:
    """4 features at right angles in 10 dimensions; feature 1 fires only where feature 0 does, which invites absorption.

    A sparse SAE saves a latent by letting that of feature 1 carry feature 0 too, and so misses feature 0 there.
    """
    tree = Tree.of(4, {0: [1]})
    p, std = torch.full((4,), 0.2), torch.full((4,), 0.01)
    return World("absorption", orthonormal(4, 10, seed=4), p, torch.ones(4), std, tree=tree)


def synth_sae_bench(name: str, n_features: int, d_in: int, n_roots: int, seed: int = 42) -> World:
    """A world by the recipe of SynthSAEBench: see the table in SAELens' docs/synth_sae_bench.md.

    Zipf firing (exponent .5, from .4 to 5e-4), trees of depth 3 with 4 children each that exclude each other and are
    scaled by their parent, rank-25 correlations of scale .1, directions spread by 100 steps at 3e-4, means from 5 to
    4, folded normal spreads, a bias of norm .5.

    An SAE whose seed is that of the world begins with its directions, since both draw them first: give it another.
    """
    tree = Tree.forest(n_features, n_roots, branching=4, depth=3)
    # Drawn in the order and from the seeds of SAELens, so that a seed makes the same world there (on its CPU) and here.
    generator = torch.Generator().manual_seed(seed)
    directions = spread(n_features, d_in, generator, n_steps=100, lr=3e-4)
    bias = torch.randn(d_in, generator=generator)
    std = 0.5 + 0.5 * torch.randn(n_features, generator=torch.Generator().manual_seed(seed + 1))
    return World(
        name,
        directions,
        _compensated(zipf(n_features, 0.5, 0.4, 5e-4), tree),
        mean=torch.linspace(5, 4, n_features),
        std=std.abs(),
        copula=Copula.low_rank(n_features, 25, 0.1, seed + 4),
        tree=tree,
        bias=0.5 * bias / bias.norm(),
    )


def _compensated(p: Float[Tensor, " n"], tree: Tree) -> Float[Tensor, " n"]:
    """Raise probabilities by about what the hierarchy will take away (as SAELens does: to first order only)."""
    has_parent = tree.parent >= 0
    parent = tree.parent.clamp(min=0)
    above = torch.where(has_parent, p[parent], 1.0)
    of_siblings = torch.zeros_like(p).index_add(0, parent[has_parent], p[has_parent])[parent] - p
    rivals = torch.where(has_parent & tree.exclusive[parent], of_siblings / above, 0.0)
    return (p / above * (1 + rivals)).clamp(max=1)


WORLDS: dict[str, Callable[[], World]] = {
    build.__name__: build for build in (t1, t2, t3, t4, synth_sae_bench_16k, absorption)
}
"""Those that have a name."""
