"""Running a model as one of its graphs: every component reads the prompt's state along the graph's edges only.

A component v of the graph reads

    x_v = (the stream it reads in the other state) + sum over its senders u of (c_u - c_u'),

with c_u as u gives it in this very run; what is not in the graph gives what it gives in the other state. With all edges
this is the model on the prompts, with none the model in the other state, both exactly; all edges but one is direct path
patching of that one.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.behavior.measure import margin_of
from sae.lm.hooks import edit
from sae.weights.circuits.contrasted import Contrasted, State, read_state
from sae.weights.circuits.graph import Node, possible
from sae.weights.stream import Site, Stream, coordinates_at, instead

Array = np.ndarray


class Runner:
    """Runs graphs over the same prompts, whose two states it keeps.

    Attributes:
        nodes: the components.
        n_runs: graphs run so far.
    """

    def __init__(self, lm: Any, stream: Stream, nodes: list[Node], given: Contrasted) -> None:
        """Run the prompts once in both states."""
        self.lm, self.stream, self.nodes, self.given = lm, stream, nodes, given
        self.states = [read_state(lm, stream, given, rows) for rows in given.rows]
        self.allowed = possible(nodes)
        self.n_runs = 0

    @torch.no_grad()
    def margins(self, mask: Bool[Array, "node node"]) -> Float[Array, " n"]:
        """Each prompt's margin when the model is this graph."""
        self.n_runs += 1
        found = []
        for rows, state in zip(self.given.rows, self.states, strict=True):
            run = _Run.begin(self.stream, self.nodes, state, mask, self.allowed)
            for site in self.stream.sites:
                self._site(run, site, rows.clean)
            final = run.read(state.reads["logits"], len(self.nodes) - 1)
            with edit(self.lm, {self.stream.final: instead(final)}):
                last = self.lm.logits(rows.clean)[:, -1].float().cpu()
            found.append(margin_of(last, rows.behavior_ids, rows.alternative_ids).double())
        return torch.cat(found).numpy()

    def _site(self, run: "_Run", site: Site, batch: Any) -> None:
        """Work out what the nodes of one site give."""
        own = [index for index, node in enumerate(self.nodes) if node.site == site.name and run.mask[index].any()]
        groups: dict[bytes, list[int]] = {}
        for index in own:
            senders = run.mask[:, index]
            if not senders.any():
                continue
            if run.is_intact(index):
                run.intact[index] = True
                run.put(site, [index], run.state.inner[site.name])
            else:
                groups.setdefault(senders.tobytes(), []).append(index)
        if not groups:
            return
        inputs = torch.stack([run.read(run.state.reads[site.name], members[0]) for members in groups.values()])
        given = coordinates_at(self.lm, site, batch, inputs)
        for members, inner in zip(groups.values(), given, strict=True):
            run.put(site, members, inner)


class _Run(NamedTuple):
    """One graph on one batch, part of the way."""

    stream: Stream
    nodes: list[Node]
    state: State
    mask: Array
    allowed: Array
    moved: dict[str, Tensor]  #: by site, its coordinates minus those of the other state; 0 so far
    intact: Array  #: nodes known to give just what they give on the prompts

    @classmethod
    def begin(cls, stream: Stream, nodes: list[Node], state: State, mask: Array, allowed: Array) -> "_Run":
        intact = np.zeros(len(nodes), dtype=bool)
        intact[0] = True
        moved = {name: torch.zeros_like(values) for name, values in state.corrupt.items()}
        return cls(stream, nodes, state, mask & allowed, allowed, moved, intact)

    def is_intact(self, index: int) -> bool:
        """Whether a node reads all that it can, all of it as on the prompts."""
        return bool((self.mask[:, index] == self.allowed[:, index]).all() and self.intact[self.mask[:, index]].all())

    def put(self, site: Site, members: list[int], inner: Tensor) -> None:
        """Note what some nodes of a site give."""
        columns = torch.from_numpy(np.concatenate([self.nodes[index].coordinates for index in members]))
        moved = (inner - self.state.corrupt[site.name]) * self.state.real
        self.moved[site.name][..., columns] = moved[..., columns]

    def read(self, x: Tensor, index: int) -> Tensor:
        """What a node reads: the other state's stream, and its senders' differences."""
        senders = np.flatnonzero(self.mask[:, index])
        columns: dict[str, list[Array]] = {}
        for sender in senders:
            if sender == 0:
                x = x + (self.state.embed - self.state.corrupt_embed)
            else:
                columns.setdefault(self.nodes[sender].site, []).append(self.nodes[sender].coordinates)
        for name, parts in columns.items():
            chosen = torch.from_numpy(np.concatenate(parts))
            x = x + self.moved[name][..., chosen] @ self.stream.site(name).weight[:, chosen].t()
        return x
