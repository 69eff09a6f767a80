"""What each edge of a model's graph carries of a behaviour's margin, all edges at once, by gradients.

    score(u -> v) = mean over prompts of  sum over tokens of  (c_u - c_u') . g_v

c_u is what u adds to the residual stream on the prompt, c_u' what it adds in the other state
(`contrasted.py`), g_v the gradient of the margin by what v reads, as far as v alone passes it on. Above 0 the
edge speaks for the behaviour. It is the first-order effect of giving v the other c_u, exact where all behind it is
linear.

- *EAP* (Syed et al. 2310.10348): the gradient on the prompts as they are (`n_steps=0`).
- *EAP-IG* (Hanna et al. 2403.17806): its mean over embeddings on the straight line from the other state's to the
  prompts'. Better where the margin saturates.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.behavior.measure import Progress, margin_of
from sae.weights.circuits.contrasted import Contrasted, Rows, State, read_state
from sae.weights.circuits.graph import LOGITS, Node, possible
from sae.weights.stream import Site, Stream, traced

Array = np.ndarray


class EdgeScores(NamedTuple):
    """Scores in nats of margin; above 0 = it speaks for the behaviour."""

    edges: Float[Array, "node node"]  #: from row to column; 0 where there can be no edge
    nodes: Float[Array, " node"]  #: of all that a node passes on; 0 for the logits


@torch.no_grad()
def part_scores(lm: Any, stream: Stream, given: Contrasted, n_steps: int = 5) -> dict[str, Float[Array, " inner"]]:
    """Score of every inner coordinate of every site (every neuron, say), over all ways behind it."""
    total: dict[str, Tensor] = {}
    for rows in given.rows:
        state = read_state(lm, stream, given, rows)
        for place in _places(n_steps):
            with torch.enable_grad():
                trace = _trace(lm, stream, rows, state, place)
            for site in stream.sites:
                moved = (state.inner[site.name] - state.corrupt[site.name]) * (trace.out[site.name] @ site.weight)
                total[site.name] = total.get(site.name, 0) + moved.sum((0, 1)).double() / len(_places(n_steps))
    return {name: (values / given.n).cpu().numpy() for name, values in total.items()}


def edge_scores(
    lm: Any,
    stream: Stream,
    nodes: list[Node],
    given: Contrasted,
    n_steps: int = 5,
    progress: Progress | None = None,
) -> EdgeScores:
    """Score every edge.

    One forward and one backward a batch and step, and the backward of its own site a node. Memory: the graph of one
    forward over a batch, and its activations.

    Args:
        lm: the model.
        stream: its sites.
        nodes: from `make_nodes`.
        given: the prompts in both states.
        n_steps: places on the line between the states; 0 takes the gradient at the prompts.
        progress: told of batches.
    """
    edges = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    alone = torch.zeros(len(nodes), dtype=torch.float64)
    owners = _owners(stream, nodes)
    places, allowed = _places(n_steps), possible(nodes)
    for done, rows in enumerate(given.rows):
        state = read_state(lm, stream, given, rows)
        for place in places:
            with torch.enable_grad():
                trace = _trace(lm, stream, rows, state, place)
                for index, node in enumerate(nodes):
                    if node.name == LOGITS:
                        edges[:, index] += _from_all(stream, owners, state, trace.final, allowed[:, index])
                    elif node.site:
                        site = stream.site(node.site)
                        gradient = _reading(trace, site, node)
                        edges[:, index] += _from_all(stream, owners, state, gradient, allowed[:, index])
                        own = (state.inner[site.name] - state.corrupt[site.name]) * (trace.out[site.name] @ site.weight)
                        alone[index] += own.sum((0, 1))[torch.from_numpy(node.coordinates)].sum().double().cpu()
            del trace
        if progress is not None:
            progress("edges", done + 1, len(given.rows))
    scale = given.n * len(places)
    found = np.where(allowed, (edges / scale).numpy(), 0.0)
    node_scores = (alone / scale).numpy()
    node_scores[0] = found[0].sum()  # the embeddings' edges are all that they pass on
    return EdgeScores(found, node_scores)


def _places(n_steps: int) -> list[float]:
    """Where on the line from the other state (0) to the prompts (1): midpoints."""
    return [(step + 0.5) / n_steps for step in range(n_steps)] or [1.0]


class _Trace(NamedTuple):
    """One forward's activations with their graph, and the margin's gradients."""

    found: dict[str, Tensor]
    inner: dict[str, Tensor]
    out: dict[str, Tensor]  #: gradient by what each site adds, over all ways behind it
    final: Tensor  #: gradient by the last stream


def _trace(lm: Any, stream: Stream, rows: Rows, state: State, place: float) -> _Trace:
    embed = torch.lerp(state.corrupt_embed, state.embed, place).requires_grad_()
    with traced(lm, stream, embed) as found:
        last = lm.forward(rows.clean)[:, -1].float().cpu()
    margin = margin_of(last, rows.behavior_ids, rows.alternative_ids).sum()
    # Rows do not touch each other, so the gradient of the sum holds each row's own.
    *out, final = torch.autograd.grad(
        margin, [*(found[site.out] for site in stream.sites), found[stream.final]], retain_graph=True
    )
    inner = {site.name: found[site.name] if site.kind == "cut" else site.coordinates(found) for site in stream.sites}
    gradients = {site.name: gradient.float() for site, gradient in zip(stream.sites, out, strict=True)}
    return _Trace(found, inner, gradients, final.float())


def _reading(trace: _Trace, site: Site, node: Node) -> Float[Tensor, "batch pos d_model"]:
    """The margin's gradient by what a node reads, through this node only."""
    wanted = trace.out[site.name] @ site.weight
    chosen = torch.zeros_like(wanted)
    columns = torch.from_numpy(node.coordinates).to(wanted.device)
    chosen[..., columns] = wanted[..., columns]
    reads = trace.found[f"{site.name}.reads" if site.kind == "cut" else site.reads]
    inner = trace.inner[site.name]
    (gradient,) = torch.autograd.grad(inner, reads, chosen.to(inner.dtype), retain_graph=True)
    return gradient.float()


def _owners(stream: Stream, nodes: list[Node]) -> dict[str, Tensor]:
    """By site, the node of each inner coordinate."""
    found = {site.name: torch.zeros(site.width, dtype=torch.int64) for site in stream.sites}
    for index, node in enumerate(nodes):
        if node.site:
            found[node.site][torch.from_numpy(node.coordinates)] = index
    return found


@torch.no_grad()
def _from_all(
    stream: Stream,
    owners: dict[str, Tensor],
    state: State,
    gradient: Float[Tensor, "batch pos d_model"],
    allowed: Bool[Array, " node"],
) -> Float[Tensor, " node"]:
    """What each possible sender's contribution, along a reader's gradient, comes to, over all prompts and tokens."""
    found = torch.zeros(len(allowed), dtype=torch.float64)
    gradient = gradient * state.real
    found[0] = ((state.embed - state.corrupt_embed) * gradient).sum().double().cpu()
    for site in stream.sites:
        if not allowed[int(owners[site.name][0])]:
            continue
        moved = (state.inner[site.name] - state.corrupt[site.name]) * (gradient @ site.weight)
        found.index_add_(0, owners[site.name], moved.sum((0, 1)).double().cpu())
    return found
