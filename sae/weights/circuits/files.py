"""A circuit as files: GraphML for graph tools (networkx, Gephi, yEd, Cytoscape), JSON for scripts."""

from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from sae.files import write_json, write_text
from sae.weights.circuits.circuit import Circuit
from sae.weights.circuits.graph import used

SCHEMA_VERSION = 1
_NODE_KEYS = {"kind": "string", "layer": "int", "score": "double"}
_EDGE_KEYS = {"weight": "double"}


def as_record(circuit: Circuit) -> dict[str, Any]:
    """The graph as plain values: `nodes` (name, kind, layer, score), `edges` (source, target, weight), strongest first.

    Scores and weights are in nats of margin; above 0 = it speaks for the behaviour.
    """
    nodes = [
        {
            "name": circuit.nodes[index].name,
            "kind": circuit.nodes[index].kind,
            "layer": circuit.nodes[index].layer,
            "score": float(circuit.scores.nodes[index]),
        }
        for index in np.flatnonzero(used(circuit.mask))
    ]
    pairs = [(int(source), int(target)) for source, target in zip(*np.nonzero(circuit.mask), strict=True)]
    pairs.sort(key=lambda pair: (-abs(float(circuit.scores.edges[pair])), pair))
    edges = [
        {
            "source": circuit.nodes[source].name,
            "target": circuit.nodes[target].name,
            "weight": float(circuit.scores.edges[source, target]),
        }
        for source, target in pairs
    ]
    return {"schema_version": SCHEMA_VERSION, "nodes": nodes, "edges": edges}


def graphml(record: dict[str, Any]) -> str:
    """A record of `as_record` as GraphML."""
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        'xsi:schemaLocation="http://graphml.graphdrawing.org/xmlns '
        'http://graphml.graphdrawing.org/xmlns/1.0/graphml.xsd">',
    ]
    for what, keys in (("node", _NODE_KEYS), ("edge", _EDGE_KEYS)):
        lines += [
            f'  <key id="{name}" for="{what}" attr.name="{name}" attr.type="{kind}"/>' for name, kind in keys.items()
        ]
    lines.append('  <graph id="circuit" edgedefault="directed">')
    for node in record["nodes"]:
        data = "".join(f'<data key="{key}">{node[key]}</data>' for key in _NODE_KEYS)
        lines.append(f"    <node id={quoteattr(node['name'])}>{data}</node>")
    for edge in record["edges"]:
        ends = f"source={quoteattr(edge['source'])} target={quoteattr(edge['target'])}"
        lines.append(f'    <edge {ends}><data key="weight">{edge["weight"]!r}</data></edge>')
    return "\n".join([*lines, "  </graph>", "</graphml>", ""])


def write_graph(circuit: Circuit, folder: Path) -> dict[str, Any]:
    """Write `graph.json` and `graph.graphml`; return the record."""
    record = as_record(circuit)
    write_json(folder / "graph.json", record)
    write_text(folder / "graph.graphml", graphml(record))
    return record
