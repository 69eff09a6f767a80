"""The smallest graph of a model's parts that still shows a behaviour, and how far it can be trusted.

Edges are scored on one split of the prompts (`edges.py`), the size of the graph is chosen on a second, and
everything reported is measured on a third, by running the model as the graph (`patching.py`):

    faithfulness = (margin of the graph - margin without any edge) / (margin of the model - margin without any edge)

As in MIB (Mueller et al. 2504.13151), CPR is the area below faithfulness over the share of edges kept, CMD that between
it and 1. Random graphs of as many edges, all on ways from embeddings to logits, stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae import stats
from sae.behavior.contrast import ContrastSet
from sae.behavior.measure import Progress
from sae.errors import UserError, unknown
from sae.weights.circuits.contrasted import CORRUPTIONS, contrasted
from sae.weights.circuits.edges import EdgeScores, edge_scores, part_scores
from sae.weights.circuits.graph import Node, make_nodes, random_graph, strongest, used
from sae.weights.circuits.patching import Runner
from sae.weights.stream import Stream, open_stream

Array = np.ndarray
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  #: of the edges, as in MIB
ATTENTION = ("heads", "whole")
_REFINED = 5  # sizes tried between one that is too small and one that will do


@dataclass(frozen=True)
class CircuitSettings:
    """How a circuit is looked for.

    Attributes:
        share: faithfulness to keep.
        corrupt: the state compared with, see `sae.weights.circuits.contrasted`.
        attention: "heads", or "whole": attention of a layer as one node.
        n_neurons: neurons of largest score that are nodes of their own; 0 leaves every MLP whole.
        n_steps: of EAP-IG; 0 is EAP.
        n_prompts: positives a split, at most.
        n_random: random graphs.
        n_checked: strongest edges that are measured by path patching.
        batch_prompts: prompts run at once.
        seed: of the random graphs.
    """

    share: float = 0.85
    corrupt: str = "auto"
    attention: str = "heads"
    n_neurons: int = 64
    n_steps: int = 5
    n_prompts: int = 32
    n_random: int = 20
    n_checked: int = 10
    batch_prompts: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"circuit.share={self.share} is no share of a behaviour: give a number above 0, up to 1.")
        if self.corrupt not in CORRUPTIONS:
            raise unknown("circuit.corrupt", self.corrupt, list(CORRUPTIONS))
        if self.attention not in ATTENTION:
            raise unknown("circuit.attention", self.attention, list(ATTENTION))
        for name in ("n_neurons", "n_steps", "n_random", "n_checked", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"circuit.{name}={getattr(self, name)} is negative: give 0 or more.")
        for name in ("n_prompts", "batch_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"circuit.{name}={getattr(self, name)} leaves no prompt: give at least 1.")


class Size(NamedTuple):
    """A graph of the strongest edges."""

    n_asked: int  #: strongest edges taken, of which dead ones are left out
    n_nodes: int
    n_edges: int
    faithfulness: float


class Checked(NamedTuple):
    """An edge's score beside what giving its reader the other state really changes; nats of margin."""

    source: str
    target: str
    score: float
    measured: float


class Margins(NamedTuple):
    """On the report split. Nats, and the share of prompts above 0."""

    model: float
    circuit: float
    empty: float
    model_rate: float
    circuit_rate: float
    empty_rate: float


@dataclass(frozen=True, eq=False)
class Circuit:
    """A behaviour's graph.

    Attributes:
        nodes: all components, in order.
        scores: of all edges and nodes, on the find split.
        mask: the graph's edges.
        faithfulness: on the report split, by the graph; NaN where the behaviour's margin does not move at all.
        reached: whether some size had the asked faithfulness on the select split; else the graph has all edges.
        margins: what faithfulness is made of.
        interval: of faithfulness, over the report prompts.
        curve: faithfulness by size on the report split.
        cpr, cmd: areas of that curve.
        random: faithfulness of random graphs of as many edges.
        random_p: share of them, the graph counted in, that are at least as faithful.
        checked: the strongest edges, measured on the find split.
        agreement: rank correlation of their scores with what was measured.
        method: how the other state was made, "paired" or "mean".
        n_prompts: by split.
    """

    nodes: list[Node]
    scores: EdgeScores
    mask: Bool[Array, "node node"]
    faithfulness: float
    reached: bool
    margins: Margins
    interval: stats.Interval
    curve: list[Size]
    cpr: float
    cmd: float
    random: list[float]
    random_p: float
    checked: list[Checked]
    agreement: stats.Correlation
    method: str
    n_prompts: dict[str, int]

    @property
    def members(self) -> list[Node]:
        """The nodes that have an edge."""
        return [self.nodes[index] for index in np.flatnonzero(used(self.mask))]


def find_circuit(
    lm: Any,
    contrast: ContrastSet,
    settings: CircuitSettings = CircuitSettings(),
    cuts: Sequence[tuple[Any, Sequence[int]]] = (),
    progress: Progress | None = None,
) -> Circuit:
    """Find a behaviour's graph.

    Args:
        lm: the model.
        contrast: prompts in three splits.
        settings: see there.
        cuts: SAEs after some blocks, each with the latents that are to be nodes.
        progress: told of batches, sizes and random graphs.

    Raises:
        UserError: a split without both classes, or a model that is not made of such parts.
    """
    stream = open_stream(lm, cuts)
    splits = {}
    for name in stats.SPLITS:
        part = contrast.split(name)
        positives = part.positives[: settings.n_prompts]
        splits[name] = contrasted(lm, stream, positives, part.negatives, settings.corrupt, settings.batch_prompts)
    nodes = choose_nodes(lm, stream, splits["find"], settings)
    scores = edge_scores(lm, stream, nodes, splits["find"], settings.n_steps, progress)
    chosen = _Measured(Runner(lm, stream, nodes, splits["select"]), scores)
    n_asked, reached = _smallest(chosen, settings.share, progress)
    held = _Measured(Runner(lm, stream, nodes, splits["report"]), scores)
    mask = strongest(scores.edges, held.runner.allowed, n_asked)
    margins = held.runner.margins(mask)
    curve = _curve(held, progress)
    rng = np.random.default_rng(settings.seed)
    random = []
    for draw in range(settings.n_random):
        random.append(held.faithfulness(random_graph(held.runner.allowed, int(mask.sum()), rng)))
        _tell(progress, "random graphs", draw + 1, settings.n_random)
    own = held.of(margins)
    checked = _check(Runner(lm, stream, nodes, splits["find"]), scores, mask, settings.n_checked)
    return Circuit(
        nodes=nodes,
        scores=scores,
        mask=mask,
        faithfulness=own,
        reached=reached,
        margins=_margins(held, margins),
        interval=stats.bootstrap_mean((margins - held.empty) / held.span, seed=settings.seed),
        curve=curve,
        cpr=_area([(size.n_asked, size.faithfulness) for size in curve]),
        cmd=_area([(size.n_asked, abs(1 - size.faithfulness)) for size in curve], start=1.0),
        random=random,
        random_p=stats.draws_p(own, random) if random else float("nan"),
        checked=checked,
        agreement=stats.spearman([edge.score for edge in checked], [edge.measured for edge in checked]),
        method=splits["find"].method,
        n_prompts={name: part.n for name, part in splits.items()},
    )


def choose_nodes(lm: Any, stream: Stream, given: Any, settings: CircuitSettings) -> list[Node]:
    """All components, with the neurons of largest score among them by themselves."""
    neurons: dict[str, list[int]] = {}
    if settings.n_neurons:
        scores = part_scores(lm, stream, given, settings.n_steps)
        ranked = sorted(
            (
                (-abs(float(value)), site.name, index)
                for site in stream.sites
                if site.kind == "mlp"
                for index, value in enumerate(scores[site.name])
            )
        )
        for _, name, index in ranked[: settings.n_neurons]:
            neurons.setdefault(name, []).append(index)
    return make_nodes(stream, int(lm.bridge.cfg.n_heads), neurons, settings.attention == "whole")


class _Measured:
    """Faithfulness of graphs on one split."""

    def __init__(self, runner: Runner, scores: EdgeScores) -> None:
        self.runner, self.scores = runner, scores
        self.full = runner.margins(runner.allowed)
        self.empty = runner.margins(np.zeros_like(runner.allowed))
        span = float(self.full.mean() - self.empty.mean())
        self.span = span if abs(span) > 1e-9 else float("nan")

    def of(self, margins: Float[Array, " n"]) -> float:
        return float(margins.mean() - self.empty.mean()) / self.span

    def faithfulness(self, mask: Array) -> float:
        return self.of(self.runner.margins(mask))

    def size(self, n_asked: int) -> Size:
        mask = strongest(self.scores.edges, self.runner.allowed, n_asked)
        # Without a single way from the embeddings to the logits it is the other state: no need to run it.
        value = self.faithfulness(mask) if mask.any() else 0.0 * self.span
        return Size(n_asked, int(used(mask).sum()), int(mask.sum()), value)


def _smallest(measured: _Measured, share: float, progress: Progress | None) -> tuple[int, bool]:
    """Fewest strongest edges that keep the share: sizes doubled until one does, then halved between.

    Faithfulness need not grow with every edge, so smaller sizes between those tried may do, too.
    """
    n_edges = int(measured.runner.allowed.sum())
    sizes = [*(2**power for power in range(n_edges.bit_length()) if 2**power < n_edges), n_edges]
    low = 0
    for step, high in enumerate(sizes):
        _tell(progress, "sizes", step + 1, len(sizes))
        if measured.size(high).faithfulness >= share:
            break
        low = high
    else:
        return n_edges, False
    for _ in range(_REFINED):
        middle = (low + high) // 2
        if high - low <= max(1, high // 20):
            break
        low, high = (low, middle) if measured.size(middle).faithfulness >= share else (middle, high)
    return high, True


def _curve(measured: _Measured, progress: Progress | None) -> list[Size]:
    n_edges = int(measured.runner.allowed.sum())
    found = []
    for step, share in enumerate(SHARES):
        found.append(measured.size(max(1, round(share * n_edges))))
        _tell(progress, "curve", step + 1, len(SHARES))
    return found


def _area(points: Sequence[tuple[int, float]], start: float = 0.0) -> float:
    """Area below a curve by the share of edges kept, from `start` at none (trapezoids)."""
    whole = points[-1][0]
    shares = [0.0, *(n / whole for n, _ in points)]
    return float(np.trapezoid([start, *(value for _, value in points)], shares))


def _margins(measured: _Measured, own: Float[Array, " n"]) -> Margins:
    each = (measured.full, own, measured.empty)
    means, rates = [float(values.mean()) for values in each], [float((values > 0).mean()) for values in each]
    return Margins(means[0], means[1], means[2], rates[0], rates[1], rates[2])


def _check(runner: Runner, scores: EdgeScores, mask: Array, n: int) -> list[Checked]:
    """Measure the graph's strongest edges: the model with all edges but one."""
    sources, targets = np.nonzero(mask)
    order = np.argsort(-np.abs(scores.edges[sources, targets]), kind="stable")[:n]
    full = runner.margins(runner.allowed).mean() if len(order) else 0.0
    found = []
    for source, target in zip(sources[order], targets[order], strict=True):
        without = runner.allowed.copy()
        without[source, target] = False
        change = float(full - runner.margins(without).mean())
        names = runner.nodes[source].name, runner.nodes[target].name
        found.append(Checked(*names, float(scores.edges[source, target]), change))
    return found


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
