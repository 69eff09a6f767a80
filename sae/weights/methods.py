"""The methods by name, and what each is given.

Two registries. `PARAMETER_METHODS` score every weight; the two differences come on top of those that can be had for
the utility, too. `PART_METHODS` score parts by changing the weights and reading a metric:

    PART_METHODS["mine"] = mine      # mine(problem, parts, budget, seed) -> part scores
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae.behavior.measure import MarginTask, Progress
from sae.device import trim_memory
from sae.errors import UserError, unknown
from sae.lm.matrices import Matrix, Part
from sae.weights import attribution, differences
from sae.weights.attribution import Direction, Scores
from sae.weights.decomposition.carriers import Carrier, find_carriers, weight_scores
from sae.weights.decomposition.components import Decomposition
from sae.weights.edit import Weights
from sae.weights.levels import LineSums, aggregate, line_sums
from sae.weights.objective import Objective, Passage
from sae.weights.perturbation import registry
from sae.weights.perturbation.blocks import BLOCK, Blocks
from sae.weights.perturbation.located import Metric
from sae.weights.perturbation.margins import MarginMetric
from sae.weights.perturbation.noise import Gradients
from sae.weights.stored import Stored

Array = np.ndarray
SIDES = ("behavior", "utility")


@dataclass
class Problem:
    """One behaviour to be located, on the `find` split.

    Attributes:
        lm: the model.
        matrices: where to look.
        behavior: the margin where the behaviour is due.
        utility: the cross entropy of harmless replies.
        shown, harmless: the model's own replies where the behaviour is due, and to harmless prompts.
        reference: another model's matrices, if there is one; then what is scored is the way back to it.
        ranks: of ActSVD: of the behaviour's subspace and of the utility's.
        ig_steps: points on the path of integrated gradients.
        task: the margin's prompts, for methods that evaluate it under changed weights.
        progress: told how far a method is.
        decomposition: opens or makes the model's parameter decomposition, for the method of that name.
        n_measured: components of it that are taken out one by one.
        carriers: what that method found of components, by side.
        blocks: low-rank blocks of the matrices, for methods that are given these as parts.
        scratch: folder for what is as large as the model and not needed in memory; the system's temporary one if None.
    """

    lm: Any
    matrices: list[Matrix]
    behavior: Objective
    utility: Objective
    shown: Passage
    harmless: Passage
    task: MarginTask
    reference: Weights | None = None
    ranks: tuple[int, int] = (16, 16)
    ig_steps: int = attribution.IG_STEPS
    progress: Progress | None = None
    decomposition: Callable[[], Decomposition] | None = None
    n_measured: int = 64
    carriers: dict[str, list[Carrier]] = field(default_factory=dict)
    blocks: Blocks | None = None
    scratch: Path | None = None
    extra_evaluations: float = 0.0  #: forwards that went through no objective

    @property
    def evaluations(self) -> float:
        """Forwards over the prompts so far, as `sae.weights.objective` counts them."""
        return self.behavior.evaluations + self.utility.evaluations + self.extra_evaluations

    def objective(self, side: str) -> Objective:
        """The objective of a side."""
        return self.behavior if side == "behavior" else self.utility

    def passage(self, side: str) -> Passage:
        """The replies of a side."""
        return self.shown if side == "behavior" else self.harmless


ParameterMethod = Callable[[Problem, str], Scores]
"""Scores every weight for a side."""


def _taylor(problem: Problem, side: str) -> Scores:
    return attribution.taylor(problem.objective(side), problem.reference)


def _snip(problem: Problem, side: str) -> Scores:
    return attribution.snip(problem.objective(side), problem.reference)


def _integrated_gradients(problem: Problem, side: str) -> Scores:
    objective = problem.objective(side)
    return attribution.integrated_gradients(
        objective, problem.reference, problem.ig_steps, problem.progress, problem.scratch
    )


def _fisher(problem: Problem, side: str) -> Scores:
    return attribution.fisher(problem.objective(side), problem.reference, problem.progress)


def _wanda(problem: Problem, side: str) -> Scores:
    problem.extra_evaluations += 1
    return attribution.wanda(problem.lm, problem.passage(side), problem.matrices)


def act_svd_directions(problem: Problem) -> dict[str, list[Direction]]:
    """ActSVD's singular directions for a problem."""
    problem.extra_evaluations += 2 * len({matrix.layer for matrix in problem.matrices})
    return attribution.act_svd(problem.lm, problem.shown, problem.harmless, problem.matrices, *problem.ranks)


def _act_svd(problem: Problem, side: str) -> Scores:
    return attribution.act_svd_scores(act_svd_directions(problem), problem.matrices)


def _weight_difference(problem: Problem, side: str) -> Scores:
    return attribution.weight_difference(problem.matrices, _reference(problem))


def _activation_difference(problem: Problem, side: str) -> Scores:
    problem.extra_evaluations += 2
    return attribution.activation_difference(
        problem.lm, problem.passage(side), problem.matrices, _reference(problem), problem.scratch
    )


def _decomposition(problem: Problem, side: str) -> Scores:
    if problem.decomposition is None:
        raise UserError("method 'decomposition' needs the model's decomposition: give one as Problem.decomposition.")
    made, objective = problem.decomposition(), problem.objective(side)
    other = problem.passage(SIDES[1 - SIDES.index(side)])
    found = find_carriers(
        problem.lm, made, objective, problem.passage(side), other, problem.n_measured, problem.progress
    )  # fmt: skip
    problem.carriers[side] = found.components
    # Its training is for every behaviour and side, but none can do without it.
    problem.extra_evaluations += 2 + made.rows_run / len(objective)
    return weight_scores(made, found, problem.matrices)


def _reference(problem: Problem) -> Weights:
    if problem.reference is None:
        raise UserError("weight_difference and activation_difference need localize.reference=... to compare with.")
    return problem.reference


PartMethod = Callable[[Problem, Sequence[Part], int, int], Float[Array, " part"]]
"""Scores parts, given a budget of evaluations and a seed."""


def chance_parts(problem: Problem, parts: Sequence[Part], budget: int, seed: int) -> Float[Array, " part"]:
    """Return random scores, which need no evaluation: what chance gives."""
    return np.random.default_rng(seed).random(len(parts))


def _perturbed(name: str) -> PartMethod:
    """A method of `sae.weights.perturbation.registry`, with the margin that starts behind what has not changed."""

    def method(problem: Problem, parts: Sequence[Part], budget: int, seed: int) -> Float[Array, " part"]:
        metric: Metric = MarginMetric(problem.lm, problem.task)
        matrices = problem.matrices
        gradients: Gradients = problem.behavior.gradient
        if parts and parts[0].level == BLOCK:
            assert problem.blocks is not None
            metric, gradients = problem.blocks.metric(metric), problem.blocks.gradients(gradients)
            matrices = problem.blocks.matrices
        options: dict[str, Any] = {"gradients": gradients} if name == "gradient_directed" else {}
        if name == "adaptive" and parts and parts[0].level != BLOCK:
            options["reference"] = problem.reference
        found = registry.METHODS[name](
            metric,
            matrices,
            parts,
            budget=budget,
            seed=seed,
            progress=problem.progress,
            **options,
        )
        problem.extra_evaluations += found.evaluations
        return found.scores

    return method


PARAMETER_METHODS: dict[str, ParameterMethod] = {
    "snip": _snip,
    "taylor": _taylor,
    "integrated_gradients": _integrated_gradients,
    "fisher": _fisher,
    "wanda": _wanda,
    "act_svd": _act_svd,
    "weight_difference": _weight_difference,
    "activation_difference": _activation_difference,
    "decomposition": _decomposition,
}
ONE_SIDED = ("act_svd", "weight_difference")  #: these have no utility of their own to subtract
NEED_REFERENCE = ("weight_difference", "activation_difference")
EXPENSIVE = ("decomposition",)  #: asked for by name only
CHANCE = "chance"
PART_METHODS: dict[str, PartMethod] = {CHANCE: chance_parts} | {name: _perturbed(name) for name in registry.METHODS}


def chosen_methods(names: Sequence[str], has_reference: bool) -> list[str]:
    """Return the methods that are asked for; "all" stands for all that can be run but the expensive ones.

    Raises:
        UserError: an unknown name, or one that needs a reference where there is none.
    """
    known = [*PARAMETER_METHODS, *PART_METHODS]
    found: list[str] = []
    for name in names:
        if name == "all":
            without = EXPENSIVE if has_reference else (*EXPENSIVE, *NEED_REFERENCE)
            found += [one for one in known if one not in without]
        elif name not in known:
            raise unknown("method", name, ["all", *known])
        elif name in NEED_REFERENCE and not has_reference:
            raise UserError(f"method {name!r} compares with another model: name it with localize.reference=... .")
        else:
            found.append(name)
    return list(dict.fromkeys(found))


class _Side(NamedTuple):
    """A method's scores for one side: never all of them in memory."""

    lines: LineSums
    weights: Stored[str] | None


class Sides:
    """A method's scores for the behaviour and, where it has them, for the utility; and all that follows from them.

    Of one side after the other, sums over rows and columns are kept, of which parts' scores are made, and scores of
    single weights on disk.
    """

    def __init__(self, name: str, problem: Problem, *, weights: bool = True) -> None:
        """Run the method.

        Args:
            name: of `PARAMETER_METHODS`.
            problem: what it is given.
            weights: keep scores of single weights, too.
        """
        self.name, self._store = name, functools.partial(Stored, folder=problem.scratch)
        before = problem.evaluations
        self._behavior = self._run(problem, "behavior", weights)
        self.evaluations = {name: problem.evaluations - before}
        self._utility = None if name in ONE_SIDED else self._run(problem, "utility", weights)
        self.both = problem.evaluations - before

    def _run(self, problem: Problem, side: str, weights: bool) -> _Side:
        found = PARAMETER_METHODS[self.name](problem, side)
        kept = _Side(line_sums(found), self._store(found.items()) if weights else None)
        del found
        trim_memory()
        return kept

    @property
    def variants(self) -> list[str]:
        """The plain method and its differences."""
        ending = ("", "_set_difference", "_difference") if self._utility is not None else ("",)
        return [f"{self.name}{end}" for end in ending]

    def cost(self, variant: str) -> float:
        """Evaluations that a variant takes."""
        return self.evaluations[self.name] if variant == self.name else self.both

    def scores(self, variant: str) -> Scores:
        """Scores of single weights, on disk; `weights` must have been asked for."""
        assert self._behavior.weights is not None
        if variant == self.name:
            return self._behavior.weights
        assert self._utility is not None
        assert self._utility.weights is not None
        both = self._behavior.weights, self._utility.weights
        if variant.endswith("_set_difference"):
            return differences.set_difference(*both, keep=self._store)
        return differences.normalized_difference(*both, keep=self._store)

    def part_scores(self, variant: str, parts: Sequence[Part]) -> Float[Array, " part"]:
        """Scores of parts."""
        ours = aggregate(self._behavior.lines, parts)
        if variant == self.name:
            return ours
        assert self._utility is not None
        theirs = aggregate(self._utility.lines, parts)
        if variant.endswith("_set_difference"):
            return differences.part_set_difference(ours, theirs, parts)
        return differences.part_normalized_difference(ours, theirs)
