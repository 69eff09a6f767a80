"""Worlds whose features are known, so that an SAE can be judged by whether it found them.

    world = WORLDS["t3"]()                               # of sae.evals.worlds, or one of your own
    stream = world.stream(batch_tokens=1024, seed=0)     # what sae.train.trainer.train takes
    for sample in world.held_out(n_batches=25, batch_tokens=4096):
        sample.acts, sample.feature_acts

An activation is a sum of known directions. For one token, feature by feature:

    z       = factor @ common + own * private       standard normal, correlated as the world says (Gaussian copula)
    fires   = z > the quantile that makes it fire with probability p
    amount  = relu(mean + std * normal)             where it fires, else 0
    amount  = 0 unless the parent fires; of children that exclude each other one stays, drawn evenly
    x       = amount @ directions + bias + noise

These are the definitions of SAELens 6.54 (`sae_lens.synthetic`), so that its published numbers can be compared with.

Batch number n of a seed is a function of the two alone: a stream's whole state is the number of its next batch. The
draws of a GPU differ from those of the CPU.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import UserError

HOOK_NAME = "world"
"""What a world's stream calls its activations."""

_HALF = 2**31  # a generator on the CPU has 2^32 states it can start from; one half trains, the other is held out
_SMALLEST = 1e-6  # eigenvalue that a repaired correlation matrix may have


class Copula(NamedTuple):
    """Correlations of the normal variables behind the firing: factor @ factor.T + diag(own^2), with 1 on its diagonal.

    A full matrix has a factor as wide as it is and own = 0; few columns keep many thousand features feasible.
    """

    factor: Float[Tensor, "n_features rank"]
    own: Float[Tensor, " n_features"]

    @classmethod
    def of(cls, matrix: Float[Tensor, "n_features n_features"]) -> "Copula":
        """Take a full correlation matrix; eigenvalues below 1e-6 are raised to that and the diagonal made 1 again.

        Raises:
            UserError: the matrix is not symmetric with ones on its diagonal.
        """
        matrix = matrix.double()
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        # Rounding to float32 leaves a matrix a little askew.
        if not square or float((matrix - matrix.T).abs().max()) > 1e-5 or float((matrix.diag() - 1).abs().max()) > 1e-5:
            raise UserError(
                f"a correlation matrix of shape {list(matrix.shape)} must be square and symmetric with ones on its "
                "diagonal: correct it."
            )
        values, vectors = torch.linalg.eigh(matrix)
        factor = vectors * values.clamp(min=_SMALLEST).sqrt()
        factor = factor / factor.norm(dim=1, keepdim=True)
        return cls(factor.float(), torch.zeros(len(factor)))

    @classmethod
    def low_rank(cls, n_features: int, rank: int, scale: float, seed: int) -> "Copula":
        """Draw a factor from N(0, scale^2); rows too long to leave 1% of the variance to `own` are shortened."""
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(n_features, rank, generator=generator) * scale
        shared = factor.square().sum(1, keepdim=True)
        factor = factor * (0.99 / shared.clamp(min=0.99)).sqrt()
        return cls(factor, (1 - factor.square().sum(1)).sqrt())

    def matrix(self) -> Float[Tensor, "n_features n_features"]:
        """The correlations in full, in float64."""
        factor = self.factor.double()
        return factor @ factor.T + self.own.double().square().diag()


class Tree(NamedTuple):
    """Which features fire only where another one does."""

    parent: Int[Tensor, " n_features"]
    """Feature that must fire, always one of a lower index; -1 for none."""
    exclusive: Bool[Tensor, " n_features"]
    """Of a feature: its children exclude each other, so that at most one of them fires on a token."""
    scaled: bool = False
    """Whether a child's amount is multiplied by its parent's amount / its parent's mean."""

    @classmethod
    def of(cls, n_features: int, children: Mapping[int, list[int]]) -> "Tree":
        """Spell a hierarchy out; no children exclude each other."""
        parent = torch.full((n_features,), -1)
        for feature, below in children.items():
            parent[below] = feature
        return cls(parent, torch.zeros(n_features, dtype=torch.bool))

    @classmethod
    def forest(cls, n_features: int, n_roots: int, branching: int, depth: int) -> "Tree":
        """Full trees, numbered level by level; all siblings exclude each other and are scaled by their parents.

        Features beyond the last tree stand alone; where features run out, the last parents have fewer children.
        """
        parent = torch.full((n_features,), -1)
        start, end = 0, min(n_roots, n_features)
        for _ in range(depth):
            children = torch.arange(end, min(end + branching * (end - start), n_features))
            parent[children] = start + (children - end) // branching
            start, end = end, end + len(children)
        has_children = torch.zeros(n_features, dtype=torch.bool)
        has_children[parent[parent >= 0]] = True
        return cls(parent, has_children, scaled=True)

    def levels(self) -> list[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
        """For each depth, from those without a parent down, the features there and their parents."""
        found = []
        here = (self.parent < 0).nonzero().squeeze(1)
        while len(here):
            found.append((here, self.parent[here]))
            here = torch.isin(self.parent, here).nonzero().squeeze(1)
        return found


class Sample(NamedTuple):
    """Tokens with their truth."""

    acts: Float[Tensor, "batch d_in"]
    feature_acts: Float[Tensor, "batch n_features"]
    """Amount of each feature; 0 where it does not fire."""


class _Firing(NamedTuple):
    """The features that fire, in order of tokens."""

    rows: Int[Tensor, " n"]
    cols: Int[Tensor, " n"]
    amounts: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class World:
    """Features with known directions and firing.

    Raises:
        UserError: shapes do not fit each other, or a value is out of range.
    """

    name: str
    directions: Float[Tensor, "n_features d_in"]
    """Rows of norm 1."""
    p: Float[Tensor, " n_features"]
    """Probability of firing, before the hierarchy takes some away."""
    mean: Float[Tensor, " n_features"]
    """Of the amount where a feature fires; what falls below 0 becomes 0."""
    std: Float[Tensor, " n_features"]
    copula: Copula | None = None
    """None: features fire independently."""
    tree: Tree | None = None
    bias: Float[Tensor, " d_in"] | None = None
    noise: float = 0.0
    """Standard deviation of normal noise on every coordinate."""

    def __post_init__(self) -> None:
        n = self.n_features
        shapes = {name: (getattr(self, name), (n,)) for name in ("p", "mean", "std")}
        if self.bias is not None:
            shapes["bias"] = (self.bias, (self.d_in,))
        if self.copula is not None:
            shapes |= {"copula.factor": (self.copula.factor[:, 0], (n,)), "copula.own": (self.copula.own, (n,))}
        if self.tree is not None:
            shapes |= {"tree.parent": (self.tree.parent, (n,)), "tree.exclusive": (self.tree.exclusive, (n,))}
        where = f"world {self.name!r}"
        for name, (values, shape) in shapes.items():
            if values.shape != shape:
                raise UserError(f"{name} of {where} has shape {list(values.shape)}: make it {list(shape)}.")
        if not torch.allclose(self.directions.norm(dim=1), self.directions.new_ones(()), atol=1e-4):
            raise UserError(f"directions of {where} do not all have norm 1: divide each row by its norm.")
        if not bool(((self.p >= 0) & (self.p <= 1)).all()) or not bool((self.std >= 0).all()) or self.noise < 0:
            raise UserError(f"{where} needs p in [0, 1], std of 0 or more and noise of 0 or more: correct them.")
        if self.tree is None:
            return
        parent = self.tree.parent
        if not bool(((parent >= -1) & (parent < torch.arange(n, device=parent.device))).all()):
            raise UserError(f"in {where} a parent has no lower index than its child: number them so.")
        if self.tree.scaled and not bool((self.mean[parent[parent >= 0]] > 0).all()):
            raise UserError(f"{where} scales children by their parents, which needs a mean above 0: raise it.")

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return self.directions.shape[0]

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.directions.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that makes the world what it is."""
        digest = hashlib.sha256()
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name, value in values.items():
            for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
                digest.update(f"/{name}/{number}/".encode())
                digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "World":
        """The same world on another device, where it also draws."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            return type(value)(*map(moved, value)) if isinstance(value, Copula | Tree) else value

        return World(**{item.name: moved(getattr(self, item.name)) for item in dataclasses.fields(self)})

    def stream(self, batch_tokens: int, seed: int = 0) -> "WorldStream":
        """An endless stream of activations to train on."""
        return WorldStream(self, batch_tokens, seed)

    def held_out(self, n_batches: int, batch_tokens: int = 4096, seed: int = 0) -> Iterator[Sample]:
        """Tokens with their truth, none of which any stream of this world gives.

        Raises:
            UserError: `batch_tokens` is less than 1.
        """
        _check_batch(batch_tokens)
        for number in range(n_batches):
            yield self.sample(batch_tokens, _generator(seed, number, True, self.directions.device))

    @torch.no_grad()
    def sample(self, n_tokens: int, generator: torch.Generator) -> Sample:
        """Draw tokens with their truth."""
        firing = self._draw(n_tokens, generator)
        feature_acts = self.directions.new_zeros(n_tokens, self.n_features)
        feature_acts[firing.rows, firing.cols] = firing.amounts
        return Sample(self._embed(firing, n_tokens, generator), feature_acts)

    @torch.no_grad()
    def acts(self, n_tokens: int, generator: torch.Generator) -> Float[Tensor, "batch d_in"]:
        """The activations of `sample` alone, without ever laying out all features of all tokens."""
        return self._embed(self._draw(n_tokens, generator), n_tokens, generator)

    def max_cosines(self) -> Float[Tensor, " n_features"]:
        """Of each direction the largest |cosine| with another one; their mean, rho_mm, measures superposition."""
        largest = []
        for start in range(0, self.n_features, 1024):
            cosine = (self.directions[start : start + 1024] @ self.directions.T).abs()
            cosine.diagonal(start).zero_()
            largest.append(cosine.amax(1))
        return torch.cat(largest)

    @cached_property
    def _threshold(self) -> Float[Tensor, " n_features"]:
        return -torch.special.ndtri(self.p.double()).float()

    @cached_property
    def _levels(self) -> list[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
        return [] if self.tree is None else self.tree.levels()

    @cached_property
    def _all_shared(self) -> bool:
        return self.copula is None or not bool(self.copula.own.any())

    def _draw(self, n_tokens: int, generator: torch.Generator) -> _Firing:
        shape, device = (n_tokens, self.n_features), self.directions.device
        if self.copula is None:
            fires = torch.rand(shape, generator=generator, device=device) < self.p
        else:
            factor, own = self.copula
            z = torch.randn(n_tokens, factor.shape[1], generator=generator, device=device) @ factor.T
            if not self._all_shared:
                z.addcmul_(torch.randn(shape, generator=generator, device=device), own)
            fires = z > self._threshold
        if self.tree is not None:
            return self._descend(self.tree, fires.T.contiguous(), generator)
        rows, cols = fires.nonzero(as_tuple=True)
        return _Firing(rows, cols, self._amounts(cols, generator))

    def _amounts(self, cols: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
        normal = torch.randn(len(cols), generator=generator, device=cols.device)
        return torch.addcmul(self.mean[cols], normal, self.std[cols]).relu_()

    def _descend(self, tree: Tree, fires: Bool[Tensor, "n_features batch"], generator: torch.Generator) -> _Firing:
        """Go down the hierarchy, so that nothing is drawn for what has no firing parent. `fires` is overwritten."""
        n_tokens = fires.shape[1]
        table = torch.empty(fires.shape, device=fires.device)  # amounts, where parents are looked up
        found = []
        for level, (features, parents) in enumerate(self._levels):
            here = fires[features] if level == 0 else fires[features] & fires[parents]
            local, rows = here.nonzero(as_tuple=True)
            cols = features[local]
            amounts = self._amounts(cols, generator)
            if level > 0:
                parent = parents[local]
                if tree.scaled:
                    amounts *= table[parent, rows] / self.mean[parent]
                rivals = (tree.exclusive[parent] & (amounts > 0)).nonzero().squeeze(1)
                amounts[rivals] *= _one_of_each(parent[rivals] * n_tokens + rows[rivals], generator)
            table[cols, rows] = amounts
            here[local, rows] = amounts > 0
            fires[features] = here
            found.append((rows, cols, amounts))
        rows, cols, amounts = (torch.cat(parts) for parts in zip(*found, strict=True))
        alive = (amounts > 0).nonzero().squeeze(1)
        order = alive[rows[alive].argsort(stable=True)]
        return _Firing(rows[order], cols[order], amounts[order])

    def _embed(self, firing: _Firing, n_tokens: int, generator: torch.Generator) -> Float[Tensor, "batch d_in"]:
        counts = torch.bincount(firing.rows, minlength=n_tokens)
        acts = torch.nn.functional.embedding_bag(
            firing.cols, self.directions, counts.cumsum(0) - counts, mode="sum", per_sample_weights=firing.amounts
        )
        if self.bias is not None:
            acts += self.bias
        if self.noise:
            acts += self.noise * torch.randn(acts.shape, generator=generator, device=acts.device)
        return acts


def _check_batch(batch_tokens: int) -> None:
    if batch_tokens < 1:
        raise UserError(f"batch_tokens = {batch_tokens} is less than 1: raise it.")


def _one_of_each(groups: Int[Tensor, " n"], generator: torch.Generator) -> Bool[Tensor, " n"]:
    """Mark one entry of every group, drawn evenly."""
    lots = torch.rand(len(groups), generator=generator, device=groups.device, dtype=torch.float64)
    order = (groups + lots).argsort()  # a group is a whole number, so its entries stay together
    in_order = groups[order]
    first = torch.ones_like(groups, dtype=torch.bool)
    first[1:] = in_order[1:] != in_order[:-1]
    return torch.zeros_like(first).scatter(0, order, first)


def _generator(seed: int, number: int, held_out: bool, device: torch.device) -> torch.Generator:
    # Counting up from a place that depends on the seed, no batch comes twice in a stream, and none is in both halves.
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")
    return torch.Generator(device).manual_seed((start + number) % _HALF + held_out * _HALF)


class WorldBatch(NamedTuple):
    """What a stream gives."""

    acts: dict[str, Float[Tensor, "batch d_in"]]


class WorldStream:
    """Training batches of a world, endless and resumable; see `sae.train.interfaces.Stream`.

    Raises:
        UserError: `batch_tokens` is less than 1.
    """

    def __init__(self, world: World, batch_tokens: int, seed: int = 0) -> None:
        _check_batch(batch_tokens)
        self.world, self.batch_tokens, self.seed = world, batch_tokens, seed
        self.number = 0

    @property
    def d_in(self) -> dict[str, int]:
        """Hook name -> width."""
        return {HOOK_NAME: self.world.d_in}

    @property
    def fingerprint(self) -> str:
        """What the batches depend on, besides their number and size."""
        return f"{self.world.fingerprint}-s{self.seed}-{self.world.directions.device.type}"

    def next_batch(self) -> WorldBatch:
        """The next batch."""
        generator = _generator(self.seed, self.number, False, self.world.directions.device)
        self.number += 1
        return WorldBatch({HOOK_NAME: self.world.acts(self.batch_tokens, generator)})

    def state_dict(self) -> dict[str, Any]:
        """Number of the next batch."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a batch."""
        self.number = int(state["number"])
