"""Reading what stages found in the weights; the records are in `weights_records.py`."""

import math
from collections.abc import Mapping
from typing import Any

from sae.report.circuit import KINDS
from sae.report.svg import percent
from sae.report.values import as_dict, as_float, as_int, as_list, as_text
from sae.report.weights_records import (
    CircuitFound,
    CutRow,
    LocatedRow,
    MitigatedRow,
    WeightsFound,
    WiredLatent,
    WiredPart,
)


def read_weights(results: Mapping[str, dict[str, Any]], graph: Any) -> WeightsFound:
    """Read the results of `sae localize`, `wiring`, `circuit` (and its graph) and `mitigate`; each may be missing."""
    located = as_list(results.get("localize", {}).get("methods"))
    cuts = as_list(results.get("localize", {}).get("surgery"))
    latents = as_list(results.get("wiring", {}).get("latents"))
    return WeightsFound(
        [_located(as_dict(entry)) for entry in located],
        [_cut(as_dict(entry)) for entry in cuts],
        [_latent(as_dict(entry)) for entry in latents],
        _circuit(results.get("circuit", {}), graph),
        _mitigated(results.get("mitigate", {})),
    )


def _located(entry: dict[str, Any]) -> LocatedRow:
    return LocatedRow(
        behavior=as_text(entry.get("behavior")),
        method=as_text(entry.get("method")),
        level=as_text(entry.get("level")),
        seed=as_int(entry.get("seed")),
        evaluations=as_float(entry.get("evaluations")),
        auroc=as_float(entry.get("auroc")),
        auprc=as_float(entry.get("auprc")),
        base_rate=as_float(entry.get("base_rate")),
        decoy_share=as_float(entry.get("decoy_share")),
    )


def _cut(entry: dict[str, Any]) -> CutRow:
    return CutRow(
        behavior=as_text(entry.get("behavior")),
        method=as_text(entry.get("method")),
        level=as_text(entry.get("level")),
        fraction=as_float(entry.get("fraction")),
        before=as_float(entry.get("behavior_before")),
        after=as_float(entry.get("behavior_after")),
        degenerate=as_float(entry.get("degenerate_after")),
        others=as_float(entry.get("other_max_change")),
        kl=as_float(entry.get("kl_harmless")),
        random=as_float(entry.get("random_after")),
        comes_back=_worst([as_dict(item) for item in as_list(as_dict(entry.get("adversary")).get("removed"))]),
        passed=entry.get("passed") is True,
    )


def _worst(removed: list[dict[str, Any]]) -> str:
    """The smallest masks that bring a cut behaviour back, in words."""
    if not removed:
        return ""
    if not any(isinstance(item.get("comes_back"), bool) for item in removed):
        return "cannot be told"
    back = [as_float(item.get("high")) for item in removed if item.get("comes_back") is True]
    sizes = [high - 1 for high in back if high is not None]
    if not back:
        return "no"
    return f"yes, at masks of {percent(min(sizes))}" if sizes else "yes"


def _latent(entry: dict[str, Any]) -> WiredLatent:
    return WiredLatent(
        behavior=as_text(entry.get("behavior")),
        hook_name=as_text(entry.get("hook_name")),
        latent=as_int(entry.get("latent")),
        contrast=as_float(entry.get("contrast")),
        writers=_parts(entry.get("writers")),
        readers=_parts(entry.get("readers")),
    )


def _parts(side: Any) -> list[WiredPart]:
    return [
        WiredPart(
            part=as_text(row.get("part")),
            data=as_float(row.get("data")),
            ablated=as_float(row.get("ablated")),
            energy=as_float(row.get("energy")),
            p=as_float(row.get("p")),
        )
        for row in map(as_dict, as_list(as_dict(side).get("strongest")))
    ]


def _circuit(entry: dict[str, Any], graph: Any) -> CircuitFound | None:
    drawn = _graph(graph)
    if not entry or not drawn["edges"]:
        return None
    interval, random = as_dict(entry.get("interval")), as_dict(entry.get("random"))
    return CircuitFound(
        behavior=as_text(entry.get("behavior")),
        graph=drawn,
        n_nodes=as_int(entry.get("n_nodes")),
        n_edges=as_int(entry.get("n_edges")),
        n_possible=as_int(entry.get("n_possible")),
        faithfulness=as_float(entry.get("faithfulness")),
        low=as_float(interval.get("low")),
        high=as_float(interval.get("high")),
        random_mean=as_float(random.get("mean")),
        random_max=as_float(random.get("max")),
        cpr=as_float(entry.get("cpr")),
        cmd=as_float(entry.get("cmd")),
    )


def _graph(value: Any) -> dict[str, Any]:
    """The nodes and edges that can be drawn."""
    nodes = {}
    for node in map(as_dict, as_list(as_dict(value).get("nodes"))):
        name, layer, score = as_text(node.get("name")), as_int(node.get("layer")), as_float(node.get("score"))
        if name and layer is not None and node.get("kind") in KINDS:
            nodes[name] = {"name": name, "layer": layer, "kind": node["kind"], "score": score or 0.0}
    edges = []
    for edge in map(as_dict, as_list(as_dict(value).get("edges"))):
        ends, weight = (as_text(edge.get("source")), as_text(edge.get("target"))), as_float(edge.get("weight"))
        if all(end in nodes for end in ends) and weight is not None and math.isfinite(weight):
            edges.append({"source": ends[0], "target": ends[1], "weight": weight})
    return {"nodes": list(nodes.values()), "edges": edges}


def _rate(value: Any) -> float | None:
    return as_float(as_dict(value).get("rate"))


def _mitigated(entry: dict[str, Any]) -> list[MitigatedRow]:
    return [
        MitigatedRow(
            behavior=as_text(entry.get("behavior")),
            method=as_text(row.get("method")),
            before=_rate(row.get("behavior_before")),
            after=_rate(row.get("behavior_after")),
            restored=_rate(row.get("restored_after")),
            others=as_float(row.get("other_max_change")),
            facts=_rate(row.get("facts")),
            kl=as_float(row.get("kl_harmless")),
            n_changed=as_int(row.get("n_changed")),
            relearned=as_int(row.get("relearn_steps")),
            prefix=_rate(row.get("prefix")),
            steering=_rate(row.get("steering")),
        )
        for row in map(as_dict, as_list(entry.get("methods")))
    ]
