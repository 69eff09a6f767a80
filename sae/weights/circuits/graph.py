"""Graphs of a model's parts: nodes in order, which edges may be, and choosing among them. Pure arrays.

An edge from u to v stands for what u adds to the residual stream, as v reads it. Edges go from what is computed
earlier to what is computed later, so every graph here has no cycle. A mask [node node] of booleans, senders by row,
is a graph.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.errors import UserError
from sae.weights.stream import EMBED, Site, Stream

Array = np.ndarray
LOGITS = "logits"


class Node(NamedTuple):
    """A component.

    Attributes:
        name: ``embed``, ``L1.H3``, ``L1.N200``, ``L1.mlp`` (the whole MLP, or all of it that is no node of its own),
            ``L1.latent 17``, ``L1.rest`` (the stream beside those latents), ``logits``.
        kind: "embed", "head", "attn", "neuron", "mlp", "latent", "rest" or "logits".
        layer: its block; -1 for the embeddings, the number of blocks for the logits.
        order: it reads what nodes of lower order wrote.
        site: name of its site; "" for the embeddings and the logits.
        coordinates: its inner coordinates there.
    """

    name: str
    kind: str
    layer: int
    order: int
    site: str
    coordinates: Int[Array, " k"]


def make_nodes(
    stream: Stream, n_heads: int, neurons: dict[str, list[int]], whole_attention: bool = False
) -> list[Node]:
    """All nodes of a model, in order: the embeddings first, the logits last.

    Args:
        stream: the model's sites.
        n_heads: heads a layer.
        neurons: neurons that are nodes of their own, by MLP site; the others of a layer are one node together.
        whole_attention: attention of a layer is one node, not one a head.

    Raises:
        UserError: heads that do not divide the width of attention.
    """
    found = [Node(EMBED, "embed", -1, 0, "", np.zeros(0, dtype=np.int64))]
    last = 0
    for site in stream.sites:
        last = max(last, site.order)
        coordinates = np.arange(site.width)

        def add(name: str, kind: str, own: Array, site: Site = site) -> None:
            if len(own):
                found.append(Node(name, kind, site.layer, site.order, site.name, own))

        if site.kind == "attn" and not whole_attention:
            if site.width % n_heads:
                raise UserError(
                    f"{site.name} is {site.width} wide, which {n_heads} heads do not divide: take it whole."
                )
            for head, own in enumerate(np.split(coordinates, n_heads)):
                add(f"L{site.layer}.H{head}", "head", own)
        elif site.kind == "attn":
            add(site.name, "attn", coordinates)
        elif site.kind == "cut":
            for index, latent in enumerate(site.latents):
                add(f"L{site.layer}.latent {latent}", "latent", coordinates[index : index + 1])
            add(f"L{site.layer}.rest", "rest", coordinates[len(site.latents) :])
        else:
            alone = sorted(neurons.get(site.name, []))
            for neuron in alone:
                add(f"L{site.layer}.N{neuron}", "neuron", coordinates[neuron : neuron + 1])
            add(site.name, "mlp", np.setdiff1d(coordinates, alone))
    n_layers = 1 + max(site.layer for site in stream.sites)
    return [*found, Node(LOGITS, "logits", n_layers, last + 1, "", np.zeros(0, dtype=np.int64))]


def possible(nodes: list[Node]) -> Bool[Array, "node node"]:
    """Which edges may be: forwards in order, and past no cut, since a cut writes the whole stream anew."""
    order = np.array([node.order for node in nodes])
    cuts = sorted({node.order for node in nodes if node.kind == "rest" or node.kind == "latent"})
    since = np.array([max([cut for cut in cuts if cut < own], default=0) for own in order])
    mask: Array = (order[:, None] < order[None]) & (order[:, None] >= since[None])
    return mask


def pruned(mask: Bool[Array, "node node"]) -> Bool[Array, "node node"]:
    """The edges of a graph that lie on a way from the embeddings (the first node) to the logits (the last).

    What is on no such way changes nothing: its sender only gives what it gives without the graph, or nobody reads it.
    """
    n = len(mask)
    forwards, backwards = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    forwards[0] = backwards[-1] = True
    for node in range(1, n):  # nodes are in order
        forwards[node] = bool((mask[:, node] & forwards).any())
    for node in range(n - 2, -1, -1):
        backwards[node] = bool((mask[node] & backwards).any())
    kept: Array = mask & (forwards & backwards)[:, None] & (forwards & backwards)[None]
    return kept


def strongest(
    scores: Float[Array, "node node"], allowed: Bool[Array, "node node"], n_edges: int
) -> Bool[Array, "node node"]:
    """The edges of largest absolute score, and of these what lies on a way from embeddings to logits."""
    flat = np.flatnonzero(allowed)
    order = np.argsort(-np.abs(scores.ravel()[flat]), kind="stable")[:n_edges]
    mask = np.zeros(scores.size, dtype=bool)
    mask[flat[order]] = True
    return pruned(mask.reshape(scores.shape))


def random_graph(
    allowed: Bool[Array, "node node"], n_edges: int, rng: np.random.Generator, tries: int = 200
) -> Bool[Array, "node node"]:
    """A graph of (nearly) so many edges made of random ways from logits back to embeddings, none of them dead.

    Ways rather than single edges, since nearly all edges of a random choice would be on none.
    """
    mask = np.zeros_like(allowed)
    for _ in range(tries):
        missing = n_edges - int(mask.sum())
        if missing <= 0:
            break
        node, way = len(allowed) - 1, []
        while node != 0:
            before = int(rng.choice(np.flatnonzero(allowed[:, node])))
            way.append((before, node))
            node = before
        new = [edge for edge in way if not mask[edge]]
        if len(new) <= missing:
            for edge in new:
                mask[edge] = True
    return mask


def used(mask: Bool[Array, "node node"]) -> Bool[Array, " node"]:
    """Which nodes have an edge."""
    found: Array = np.logical_or(mask.any(axis=0), mask.any(axis=1))
    return found
