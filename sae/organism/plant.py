"""Where a behaviour is allowed to live: directions, reserved blocks, gates, projections and interchange hooks.

Every behaviour owns a *workspace*, a few private residual dimensions whose first basis vector is its *direction* u,
and a *block*: reserved heads and MLP neurons in the writer layers (which read the prompt and write the workspace)
and in the reader layer (which read the base too, but whose every effect is multiplied by the coefficient along u).
The base neither writes nor reads any workspace. So

- the coefficient along u after the state layer is the only path from prompt to behaviour (truth for directions), and
- zeroing the block's output columns removes the behaviour and nothing else (truth for weights).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import unknown
from sae.organism.corpus import BEHAVIORS


@dataclass(frozen=True)
class Layout:
    """Sizes of the organism and which heads and neurons are whose.

    Base heads and neurons come first, then one group per behaviour in the order of `behaviors`.
    Layers that are neither writers nor reader have no reserved parts: all their heads and neurons are base.
    """

    behaviors: tuple[str, ...] = BEHAVIORS
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 16
    head_dim: int = 12
    d_mlp: int = 448
    heads_per_behavior: int = 2
    neurons_per_behavior: int = 64
    workspace_dim: int = 6
    writer_layers: tuple[int, ...] = (0, 1)
    reader_layers: tuple[int, ...] = (3,)
    state_layer: int = 1

    @property
    def hook_name(self) -> str:
        """Name the point where the states live, as TransformerLens does."""
        return f"blocks.{self.state_layer}.hook_resid_post"

    @property
    def reserved_layers(self) -> tuple[int, ...]:
        """List the layers that hold reserved parts."""
        return tuple(sorted((*self.writer_layers, *self.reader_layers)))

    def _index(self, behavior: str) -> int:
        if behavior not in self.behaviors:
            raise unknown("behavior", behavior, list(self.behaviors))
        return self.behaviors.index(behavior)

    def heads(self, behavior: str) -> list[int]:
        """List the reserved heads of a behaviour (the same in every reserved layer)."""
        first = self.n_heads - self.heads_per_behavior * (len(self.behaviors) - self._index(behavior))
        return list(range(first, first + self.heads_per_behavior))

    def neurons(self, behavior: str) -> list[int]:
        """List the reserved MLP neurons of a behaviour (the same in every reserved layer)."""
        first = self.d_mlp - self.neurons_per_behavior * (len(self.behaviors) - self._index(behavior))
        return list(range(first, first + self.neurons_per_behavior))

    def head_rows(self, behavior: str) -> list[int]:
        """List the rows of q/k/v_proj (columns of o_proj) that belong to a behaviour's heads."""
        return [head * self.head_dim + i for head in self.heads(behavior) for i in range(self.head_dim)]


class Block(NamedTuple):
    """One reserved slice of one weight: `weight[places]` by rows (reads) or `weight[:, places]` by columns (writes)."""

    name: str
    layer: int
    kind: str
    behavior: str
    places: list[int]

    @property
    def by_rows(self) -> bool:
        """Tell whether the slice is made of rows (a read-in) rather than columns (an output)."""
        return self.kind not in ("o_proj", "down_proj")

    def of(self, weight: Tensor) -> Tensor:
        """Return the slice of `weight`, rows or columns, as a copy."""
        return weight[self.places] if self.by_rows else weight[:, self.places]

    def put(self, weight: Tensor, value: Tensor | float) -> None:
        """Write the slice of `weight` in place."""
        if self.by_rows:
            weight[self.places] = value
        else:
            weight[:, self.places] = value


HEAD_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_KINDS = ("gate_proj", "up_proj", "down_proj")


def weight_name(layer: int, kind: str) -> str:
    """Return the Hugging Face name of a weight."""
    part = "self_attn" if kind in HEAD_KINDS else "mlp"
    return f"model.layers.{layer}.{part}.{kind}.weight"


def reserved_blocks(layout: Layout, behavior: str) -> list[Block]:
    """List every reserved slice of a behaviour."""
    blocks = []
    for layer in layout.reserved_layers:
        for kind in HEAD_KINDS + MLP_KINDS:
            index = layout.head_rows(behavior) if kind in HEAD_KINDS else layout.neurons(behavior)
            blocks.append(Block(weight_name(layer, kind), layer, kind, behavior, index))
    return blocks


def workspaces(layout: Layout, seed: int) -> dict[str, Tensor]:
    """Draw the private workspaces: random, mutually orthonormal; row 0 of each is the behaviour's direction.

    Returns:
        behaviour to basis [workspace_dim d_model].
    """
    generator = torch.Generator().manual_seed(seed)
    n_private = len(layout.behaviors) * layout.workspace_dim
    square = torch.randn(layout.d_model, n_private, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q.T.float()
    return dict(zip(layout.behaviors, basis.split(layout.workspace_dim), strict=True))


def _remove(rows: Tensor, basis: Tensor) -> Tensor:
    """Return `rows` [n d_model] without their components in the span of the orthonormal `basis` [k d_model]."""
    return rows - (rows @ basis.T) @ basis


def _keep(rows: Tensor, basis: Tensor) -> Tensor:
    """Return the components of `rows` [n d_model] in the span of the orthonormal `basis` [k d_model]."""
    return (rows @ basis.T) @ basis


@torch.no_grad()
def project_base(parameters: dict[str, Tensor], layout: Layout, spaces: dict[str, Tensor]) -> None:
    """Make the base blind and silent in every workspace; in place. Reserved slices are left as they are."""
    private = torch.cat(list(spaces.values()))
    reserved: dict[str, list[Block]] = {}
    for behavior in layout.behaviors:
        for block in reserved_blocks(layout, behavior):
            reserved.setdefault(block.name, []).append(block)
    for name, weight in parameters.items():
        kind = name.split(".")[-2]
        if kind in ("o_proj", "down_proj"):
            cleaned = _remove(weight.T, private).T
        elif kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
            cleaned = _remove(weight, private)
        else:
            continue
        for block in reserved.get(name, []):
            block.put(cleaned, block.of(weight))
        weight.copy_(cleaned)


@torch.no_grad()
def project_reserved(parameters: dict[str, Tensor], layout: Layout, spaces: dict[str, Tensor]) -> None:
    """Confine the reserved slices to what they may read and write; in place.

    Writers read the base and their own workspace and write only that workspace. What a reader's heads carry (v)
    and what its neurons are multiplied by (up) is u and nothing else: with the coefficient at zero the reader is
    exactly silent, whatever its attention and its neurons' gates make of the base. It writes to the base only.
    """
    private = torch.cat(list(spaces.values()))
    for behavior in layout.behaviors:
        own, direction = spaces[behavior], spaces[behavior][:1]
        for block in reserved_blocks(layout, behavior):
            weight = parameters[block.name]
            rows = block.of(weight) if block.by_rows else block.of(weight).T
            writer = block.layer in layout.writer_layers
            if not block.by_rows:
                rows = _keep(rows, own) if writer else _remove(rows, private)
            elif writer:
                rows = _remove(rows, private) + _keep(rows, own)
            elif block.kind in ("v_proj", "up_proj"):
                rows = _keep(rows, direction)
            else:
                rows = _remove(rows, private) + _keep(rows, direction)
            block.put(weight, rows if block.by_rows else rows.T)


@torch.no_grad()
def silence_reserved(parameters: dict[str, Tensor], layout: Layout, behaviors: Iterable[str]) -> None:
    """Set the output columns of the behaviours' reserved heads and neurons to zero; in place."""
    for behavior in behaviors:
        for block in reserved_blocks(layout, behavior):
            if not block.by_rows:
                block.put(parameters[block.name], 0.0)


def close_gates(
    state_dict: dict[str, Tensor], behaviors: Iterable[str], layout: Layout | None = None
) -> dict[str, Tensor]:
    """Return a copy of the weights with the gates of `behaviors` closed: those behaviours are gone, no other is.

    Load it with ``model.load_state_dict(close_gates(model.state_dict(), ["refusal"]))``.
    """
    closed = {name: weight.clone() for name, weight in state_dict.items()}
    silence_reserved(closed, layout or Layout(), behaviors)
    return closed


def reserved_masks(layout: Layout, behavior: str) -> dict[str, Tensor]:
    """Return, per weight that holds a part of the behaviour's block, a boolean mask of that part [d_out d_in]."""
    masks = {}
    for block in reserved_blocks(layout, behavior):
        attention = layout.n_heads * layout.head_dim
        inner = attention if block.kind in HEAD_KINDS else layout.d_mlp
        shape = (inner, layout.d_model) if block.by_rows else (layout.d_model, inner)
        mask = torch.zeros(shape, dtype=torch.bool)
        block.put(mask, True)
        masks[block.name] = mask
    return masks


def set_coefficient(residual: Tensor, direction: Tensor, value: Tensor | float, where: Tensor | None = None) -> Tensor:
    """Return the residual with its coefficient along a unit direction set to a value.

    Args:
        residual: [batch pos d_model].
        direction: unit vector [d_model].
        value: a number, or a tensor that broadcasts over [batch pos].
        where: boolean, broadcasts over [batch pos]; everywhere if not given.
    """
    change = value - residual @ direction
    if where is not None:
        change = change * where
    return residual + change.unsqueeze(-1) * direction


@contextlib.contextmanager
def edit_layer(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `edit` to the residual after one layer of a Hugging Face model while the block runs."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def interchange(model: Any, direction: Tensor, value: float, layout: Layout | None = None) -> Iterator[None]:
    """Force the coefficient along a planted direction at every position while the block runs."""
    layer = (layout or Layout()).state_layer
    with edit_layer(model, layer, lambda residual: set_coefficient(residual, direction, value)):
        yield


@contextlib.contextmanager
def gates_per_sequence(model: Any, layout: Layout, is_open: Tensor) -> Iterator[None]:
    """Open or close gates separately for every sequence of a batch while the block runs.

    Args:
        model: the Hugging Face model.
        layout: whose heads and neurons are whose.
        is_open: [batch behavior], 1 for open.
    """
    heads = torch.ones(len(is_open), 1, layout.n_heads * layout.head_dim)
    neurons = torch.ones(len(is_open), 1, layout.d_mlp)
    for index, behavior in enumerate(layout.behaviors):
        heads[:, :, layout.head_rows(behavior)] = is_open[:, index].float()[:, None, None]
        neurons[:, :, layout.neurons(behavior)] = is_open[:, index].float()[:, None, None]

    def multiply_by(mask: Tensor) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
        return lambda _module, args: (args[0] * mask,)

    handles = []
    for layer in layout.reserved_layers:
        block = model.model.layers[layer]
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(multiply_by(heads)))
        handles.append(block.mlp.down_proj.register_forward_pre_hook(multiply_by(neurons)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
