"""A circuit beside what is known of a planted organism: are its nodes the planted parts?"""

from typing import Any, NamedTuple

import numpy as np

from sae import stats
from sae.organism.truth import Truth, read_planted
from sae.weights.circuits.circuit import Circuit


class Level(NamedTuple):
    """Heads, or neurons that are nodes of their own.

    Attributes:
        n: of them in the model.
        n_planted: of these, the behaviour's.
        auroc: of their absolute scores for being the behaviour's; None where all or none are, or where only those of
            largest score have one (neurons).
        in_graph: in the graph.
        right: of these, the behaviour's.
        decoys: of these, another planted behaviour's.
        p: of so many right ones among as many drawn at random (hypergeometric tail).
    """

    n: int
    n_planted: int
    auroc: stats.Interval | None
    in_graph: int
    right: int
    decoys: int
    p: float


class Members(NamedTuple):
    """The planted truth of one behaviour, and a circuit."""

    heads: Level
    neurons: Level
    writers: list[str]  #: planted parts of the writing layers that are in the graph
    readers: list[str]  #: and of the reading layers


def truth_of(lm: Any, behavior: str) -> Truth | None:
    """The planted truth beside a model's weights; None where there is none for this behaviour."""
    if lm.folder is None or not (lm.folder / "planted.json").is_file():
        return None
    truth = read_planted(lm.folder)
    return truth if behavior in truth.layout.behaviors else None


def compare(circuit: Circuit, truth: Truth, behavior: str) -> Members:
    """Set a circuit of an organism beside its planted truth."""
    layout = truth.layout
    owners: dict[tuple[str, int, int], str] = {}
    for name in layout.behaviors:
        for layer in layout.reserved_layers:
            owners |= {("head", layer, head): name for head in layout.heads(name)}
            owners |= {("neuron", layer, neuron): name for neuron in layout.neurons(name)}
    planted = sorted(
        (layer, node.name)
        for node in circuit.members
        if owners.get((node.kind, layer := node.layer, _number(node.name))) == behavior
    )
    return Members(
        heads=_level(circuit, "head", layout.n_layers * layout.n_heads, owners, behavior),
        neurons=_level(circuit, "neuron", layout.n_layers * layout.d_mlp, owners, behavior),
        writers=[name for layer, name in planted if layer in layout.writer_layers],
        readers=[name for layer, name in planted if layer in layout.reader_layers],
    )


def _number(name: str) -> int:
    digits = name.split(".")[-1][1:]
    return int(digits) if digits.isdigit() else -1


def _level(circuit: Circuit, kind: str, n: int, owners: dict[tuple[str, int, int], str], behavior: str) -> Level:
    own = [owners.get((kind, node.layer, _number(node.name))) for node in circuit.nodes]
    rows = [index for index, node in enumerate(circuit.nodes) if node.kind == kind]
    flags = np.array([own[row] == behavior for row in rows], dtype=bool)
    whole = len(rows) == n and flags.any() and not flags.all()
    inside = {node.name for node in circuit.members if node.kind == kind}
    found = [own[row] for row in rows if circuit.nodes[row].name in inside]
    right = sum(name == behavior for name in found)
    n_planted = sum(key[0] == kind and name == behavior for key, name in owners.items())
    return Level(
        n=n,
        n_planted=n_planted,
        auroc=stats.auroc_interval(np.abs(circuit.scores.nodes[rows]), flags) if whole else None,
        in_graph=len(found),
        right=right,
        decoys=sum(name not in (None, behavior) for name in found),
        p=stats.overlap_p(right, len(found), n_planted, n),
    )
