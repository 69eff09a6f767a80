"""A circuit as a picture: layers from bottom to top, edges as wide as they are strong, colour by sign."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae.report.svg import Figure, Key, fit_text, number, standalone, text_width

MAX_EDGES = 250  # drawn; more are a smear
_ROW, _GAP, _HEIGHT = 86.0, 10.0, 22.0
_PER_ROW = 14
#: Kinds of node, and the lane of a layer that each is drawn in.
KINDS = {"embed": 0, "attn": 1, "head": 1, "neuron": 2, "mlp": 2, "latent": 3, "rest": 3, "logits": 4}
_SIZES = (0.8, 7.0)  # widths of edges in pixels


def circuit_svg(graph: Mapping[str, Any], title: str, note: str = "") -> str:
    """Draw a graph as a file of its own; see `circuit_figure`."""
    return standalone(circuit_figure(graph, title, note))


def circuit_figure(graph: Mapping[str, Any], title: str, note: str = "") -> str:
    """Draw a graph.

    Args:
        graph: `nodes` with name, kind, layer and score; `edges` with source, target and weight, strongest first.
        title: for the heading and for screen readers.
        note: one line below it.
    """
    edges = list(graph["edges"])[:MAX_EDGES]
    names = {end for edge in edges for end in (edge["source"], edge["target"])}
    nodes = [node for node in graph["nodes"] if node["name"] in names]
    rows = _rows(nodes, edges)
    widths = {node["name"]: text_width(node["name"], 12) + 18 for node in nodes}
    widest = max((sum(widths[node["name"]] + _GAP for node in row) for row in rows), default=0.0)
    width = max(560.0, widest + 120)
    figure = Figure(width, 0.0, left=70, right=30, top=52, bottom=20)
    figure.text(20, 24, fit_text(title, width - 40, 14), cls="strong")
    if len(edges) < len(graph["edges"]):
        note = f"{note}{'; ' if note else ''}the strongest {len(edges)} of {len(graph['edges'])} edges drawn"
    if note:
        figure.text(20, 42, fit_text(note, width - 40, 11), cls="small")
    figure.legend([Key("for the behaviour", 1), Key("against it", 2)])
    figure.height = figure.top + 60 + _ROW * max(0, len(rows) - 1)
    places = _places(rows, widths, figure)
    largest = max((abs(edge["weight"]) for edge in edges), default=1.0) or 1.0
    for edge in reversed(edges):  # the strongest on top
        _draw_edge(figure, edge, places, largest)
    for row in rows:
        for node in row:
            _draw_node(figure, node, places[node["name"]], widths[node["name"]])
        figure.text(14, places[row[0]["name"]][1] + 4, _lane_name(row[0]), cls="small")
    described = f"{len(nodes)} components and {len(edges)} edges from the embeddings at the bottom to the logits."
    return figure.render(title, described)


def _rows(nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Nodes by layer and lane from the bottom up, wide lanes in several rows, ordered to cross little."""
    lanes: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for node in nodes:
        lanes.setdefault((node["layer"], KINDS[node["kind"]]), []).append(node)
    rows = []
    for key in sorted(lanes):
        lane = lanes[key]
        n_rows = math.ceil(len(lane) / _PER_ROW)
        size = math.ceil(len(lane) / n_rows)
        rows += [lane[start : start + size] for start in range(0, len(lane), size)]
    for _ in range(4):  # sweeps of the barycentre heuristic
        place = {node["name"]: (index + 0.5) / len(row) for row in rows for index, node in enumerate(row)}
        for row in rows:
            row.sort(key=lambda node: (_centre(node["name"], edges, place), node["name"]))
            place |= {node["name"]: (index + 0.5) / len(row) for index, node in enumerate(row)}
    return rows


def _centre(name: str, edges: Sequence[Mapping[str, Any]], place: Mapping[str, float]) -> float:
    """Mean place of a node's neighbours, by weight; its own where it has none."""
    total = weight = 0.0
    for edge in edges:
        if name in (edge["source"], edge["target"]):
            other = edge["target"] if edge["source"] == name else edge["source"]
            total += abs(edge["weight"]) * place[other]
            weight += abs(edge["weight"])
    return total / weight if weight else place[name]


def _places(
    rows: Sequence[Sequence[Mapping[str, Any]]], widths: Mapping[str, float], figure: Figure
) -> dict[str, tuple[float, float]]:
    places = {}
    for index, row in enumerate(rows):
        room = figure.x1 - figure.left
        taken = sum(widths[node["name"]] for node in row)
        gap = (room - taken) / (len(row) + 1)
        x = figure.left + gap
        for node in row:
            own = widths[node["name"]]
            places[node["name"]] = (x + own / 2, figure.height - 30 - _ROW * index)
            x += own + gap
    return places


def _draw_edge(
    figure: Figure, edge: Mapping[str, Any], places: Mapping[str, tuple[float, float]], largest: float
) -> None:
    (x0, y0), (x1, y1) = places[edge["source"]], places[edge["target"]]
    y0, y1 = y0 - _HEIGHT / 2, y1 + _HEIGHT / 2
    bend = (y0 - y1) / 2
    thick = _SIZES[0] + (_SIZES[1] - _SIZES[0]) * abs(edge["weight"]) / largest
    figure.add(
        "path",
        d=f"M{x0:.1f},{y0:.1f} C{x0:.1f},{y0 - bend:.1f} {x1:.1f},{y1 + bend:.1f} {x1:.1f},{y1:.1f}",
        cls=f"line {'k1' if edge['weight'] >= 0 else 'k2'}",
        style=f"stroke-width:{thick:.2f};opacity:{0.3 + 0.6 * abs(edge['weight']) / largest:.2f}",
        hover=f"{edge['source']} to {edge['target']}: {number(edge['weight'])} nats",
    )


def _draw_node(figure: Figure, node: Mapping[str, Any], place: tuple[float, float], width: float) -> None:
    x, y = place
    figure.add(
        "rect",
        x=x - width / 2,
        y=y - _HEIGHT / 2,
        width=width,
        height=_HEIGHT,
        rx=5,
        cls=f"hollow {'k1' if node['score'] > 0 else 'k2' if node['score'] < 0 else 'k0'}",
        hover=f"{node['name']}: {number(node['score'])} nats in all",
    )
    figure.text(x, y + 4, node["name"], anchor="middle", cls="strong")


def _lane_name(node: Mapping[str, Any]) -> str:
    """What stands at the left of a row."""
    lane = {"attn": "heads", "head": "heads", "neuron": "MLP", "mlp": "MLP", "latent": "latents", "rest": "latents"}
    return f"L{node['layer']} {lane[node['kind']]}" if node["kind"] in lane else node["kind"]
