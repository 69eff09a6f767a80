"""The matrices inside a model's blocks, and where its heads and neurons lie in them.

Read from the names that Hugging Face models give their parameters, with or without TransformerLens around them, and
checked by their shapes. A matrix of no known kind is listed all the same (`kind` is ""); heads and neurons are then
those of the others.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from sae.errors import UserError
from sae.lm.head_layout import Heads, fused_starts

if TYPE_CHECKING:
    from sae.lm.model import LanguageModel

ATTENTION = ("attn", "attention", "self_attn", "self_attention")
KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "q": "q", "k": "k", "v": "v", "query": "q", "key": "k", "value": "v",
    "qkv_proj": "qkv", "c_attn": "qkv", "query_key_value": "qkv", "Wqkv": "qkv",
    "o_proj": "o", "out_proj": "o", "dense": "o", "o": "o",
    "gate_proj": "gate", "up_proj": "in", "down_proj": "out", "gate_up_proj": "gate_in",
    "c_fc": "in", "fc1": "in", "fc_in": "in", "dense_h_to_4h": "in",
    "fc2": "out", "fc_out": "out", "dense_4h_to_h": "out",
}  # fmt: skip
"""What a module of a block does, by its name: queries, keys and values (alone, or in one matrix, ordered as
`sae.lm.head_layout` says), the output of attention, the MLP's gate and input (alone, or one after the other) and
output. GPT-2's `c_proj` is the output of either."""


class Matrix(NamedTuple):
    """One matrix of one block.

    Attributes:
        name: its Hugging Face name, such as ``model.layers.1.mlp.down_proj.weight``.
        layer: its block.
        kind: see `KINDS`; "" if unknown.
        parameter: the very tensor the model computes with.
        out_axis: 0 where it is stored [out in] (nn.Linear), 1 where it is [in out] (GPT-2's Conv1D).
    """

    name: str
    layer: int
    kind: str
    parameter: nn.Parameter
    out_axis: int


class Slice(NamedTuple):
    """Some rows or columns of one matrix."""

    name: str
    axis: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """View of that part of a tensor of the matrix's shape."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)


class Part(NamedTuple):
    """A part of the model that can be located: a head, a neuron, or a matrix, or one row or column of one.

    A head is its queries' rows and its output's columns, with its keys' and values' where no other head shares them. A
    neuron is its rows of gate and input and its column of the output. A row is an output of a matrix, a column an
    input, however the matrix is stored. A block is some of a matrix's singular directions: its slice is of what
    `sae.weights.perturbation.blocks` makes of the matrix.
    """

    level: str  #: "head", "neuron", "row", "column", "tensor" or "block"
    layer: int
    number: int
    slices: tuple[Slice, ...]

    @property
    def label(self) -> str:
        """Short name: L1.H3, L2.N117, a matrix, or its row ``[3]``, column ``[:,3]`` or directions ``{5-8}``."""
        name, _, start, stop = self.slices[0]
        inside = {"row": f"[{start}]", "column": f"[:,{start}]", "tensor": "", "block": f"{{{start + 1}-{stop}}}"}
        if self.level in inside:
            return name + inside[self.level]
        return f"L{self.layer}.{self.level[0].upper()}{self.number}"

    @property
    def family(self) -> tuple[int, str, str]:
        """The parts that it is one of: those of its level in its layer, or of its matrix where it is a piece of one."""
        own = self.level in ("row", "column", "block")
        return self.layer, self.level, self.slices[0].name if own else ""


def block_matrices(lm: "LanguageModel") -> list[Matrix]:
    """Every matrix of every block, in the model's order.

    Raises:
        UserError: compatibility mode, whose weights are processed copies; TransformerLens computing with copies of its
            own of some matrix; or no matrix at all (quantised weights).
    """
    if getattr(lm.bridge, "compatibility_mode", False):
        raise UserError(
            f"{lm.name!r} is in compatibility mode, with processed weights: load it anew to look at weights."
        )
    inside = {
        id(parameter): layer
        for layer, block in enumerate(lm.bridge.blocks)
        for parameter in block.original_component.parameters()
    }
    found: list[Matrix] = []
    seen: set[int] = set()
    for path, module in _plain_modules(lm.bridge.original_model):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():  # packed integers are no matrix
            continue
        if id(weight) in inside and id(weight) not in seen:
            seen.add(id(weight))
            axis = 1 if type(module).__name__ == "Conv1D" else 0
            found.append(Matrix(f"{path}.weight", inside[id(weight)], _kind(path), weight, axis))
    _refuse_copies(lm, found)
    if not found:
        raise UserError(f"no plain matrix in the blocks of {lm.name!r}: load it without quantisation.")
    return found


def _refuse_copies(lm: "LanguageModel", matrices: list[Matrix]) -> None:
    """Refuse a model whose bridge has split a fused matrix into copies: what is done to the matrix changes nothing.

    Where the parts are views of the matrix (GPT-2's), they change with it.
    """
    fused = [matrix for matrix in matrices if matrix.kind == "qkv"]
    own = [module._parameters.values() for _, module in _plain_modules(lm.bridge.original_model)]
    memory = {item.untyped_storage().data_ptr() for items in own for item in items if item is not None}
    for matrix in fused:
        for name, parameter in lm.bridge.blocks[matrix.layer].original_component.named_parameters():
            is_part = parameter.ndim == 2 and name.split(".")[-3:-2] in (["q"], ["k"], ["v"])
            if is_part and parameter.untyped_storage().data_ptr() not in memory:
                raise UserError(
                    f"TransformerLens computes with copies of parts of {matrix.name!r} of {lm.name!r}, so what is done "
                    "to the model's own matrices would change nothing: load the model with lm.library=transformers."
                )


def _plain_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The Hugging Face model's own modules under their own names, whatever wrappers a bridge has put between them."""
    original = getattr(module, "original_component", None)
    if isinstance(original, nn.Module):
        yield from _plain_modules(original, path)
        return
    yield path, module
    for name, child in module.named_children():
        yield from _plain_modules(child, f"{path}.{name}" if path else name)


def _kind(path: str) -> str:
    *above, last = path.split(".")
    attends = any(word in ATTENTION for word in above)
    if last == "c_proj":
        return "o" if attends else "out"
    kind = KINDS.get(last, "")
    return kind if attends or kind not in ("q", "k", "v", "o", "qkv") else ""


def neurons(lm: "LanguageModel", matrices: list[Matrix] | None = None) -> list[Part]:
    """Every MLP neuron, by block.

    Raises:
        UserError: no block has an MLP of a known kind (a mixture of experts, say).
    """
    found = []
    for layer, own in _by_layer(matrices or block_matrices(lm)).items():
        if "out" not in own:
            continue
        width = own["out"].parameter.shape[1 - own["out"].out_axis]
        inputs = [own[kind] for kind in ("gate", "in", "gate_in") if kind in own]
        halves = {matrix.name: matrix.parameter.shape[matrix.out_axis] // width for matrix in inputs}
        if not inputs or any(matrix.parameter.shape[matrix.out_axis] % width for matrix in inputs):
            continue
        for index in range(width):
            rows = [
                Slice(matrix.name, matrix.out_axis, half * width + index, half * width + index + 1)
                for matrix in inputs
                for half in range(halves[matrix.name])
            ]
            column = Slice(own["out"].name, 1 - own["out"].out_axis, index, index + 1)
            found.append(Part("neuron", layer, index, (*rows, column)))
    if not found:
        raise UserError(f"the blocks of {lm.name!r} have no MLP of a known kind: locate rows or heads instead.")
    return found


def heads(lm: "LanguageModel", matrices: list[Matrix] | None = None) -> list[Part]:
    """Every attention head, by block. Blocks where nothing tells which rows are which head's are left out.

    Raises:
        UserError: no block has attention of a known kind.
    """
    found = []
    n_heads = int(lm.bridge.cfg.n_heads)
    shared = int(getattr(lm.bridge.cfg, "n_key_value_heads", None) or n_heads)
    config = getattr(lm.bridge.original_model, "config", None)
    unknown: set[str] = set()
    for layer, own in _by_layer(matrices or block_matrices(lm)).items():
        if "o" not in own:
            continue
        width = own["o"].parameter.shape[1 - own["o"].out_axis]
        if width % n_heads:
            continue
        size = width // n_heads
        for index in range(n_heads):
            rows = _head_rows(own, index, Heads(n_heads, shared, size), config)
            if rows:
                column = Slice(own["o"].name, 1 - own["o"].out_axis, index * size, (index + 1) * size)
                found.append(Part("head", layer, index, (*rows, column)))
            elif "qkv" in own:
                unknown.add(_module(own["qkv"]))
    if not found and unknown:
        raise UserError(
            f"{lm.name!r} (model_type {getattr(config, 'model_type', None)!r}) makes queries, keys and values with one "
            f"matrix, {', '.join(sorted(unknown))}, and in which order its heads lie there is not known: locate rows "
            "or neurons instead."
        )
    if not found:
        raise UserError(f"the blocks of {lm.name!r} have no attention of a known kind: locate rows or neurons instead.")
    return found


def _module(matrix: Matrix) -> str:
    """The name of the module that holds a matrix."""
    return matrix.name.split(".")[-2]


def _head_rows(own: dict[str, Matrix], index: int, heads: Heads, config: Any) -> list[Slice]:
    """Where a head's queries lie, and its keys and values if it shares them with none; [] where that is not known."""
    n_heads, shared, size = heads

    def at(matrix: Matrix, start: int) -> Slice:
        return Slice(matrix.name, matrix.out_axis, start, start + size)

    if "qkv" in own:
        matrix = own["qkv"]
        length = matrix.parameter.shape[matrix.out_axis]
        starts = fused_starts(config, _module(matrix), heads, index, length)
        return [at(matrix, start) for start in starts or ()]
    if "q" not in own:
        return []
    # Of another length, heads lie in another way: with a gate beside each query, say, or keys shared by all.
    lengths = {kind: own[kind].parameter.shape[own[kind].out_axis] for kind in ("q", "k", "v") if kind in own}
    if any(length != size * (n_heads if kind == "q" else shared) for kind, length in lengths.items()):
        return []
    return [at(own[kind], index * size) for kind in lengths if kind == "q" or shared == n_heads]


def rows(matrices: list[Matrix]) -> list[Part]:
    """Every output row of every matrix: what writes one coordinate."""
    return [part for matrix in matrices for part in _lines("row", matrix, matrix.out_axis)]


def columns(matrices: list[Matrix]) -> list[Part]:
    """Every input column of every matrix: what reads one coordinate."""
    return [part for matrix in matrices for part in _lines("column", matrix, 1 - matrix.out_axis)]


def _lines(level: str, matrix: Matrix, axis: int) -> list[Part]:
    return [
        Part(level, matrix.layer, index, (Slice(matrix.name, axis, index, index + 1),))
        for index in range(matrix.parameter.shape[axis])
    ]


def tensors(matrices: list[Matrix]) -> list[Part]:
    """Every matrix as a whole, numbered in the model's order."""
    return [
        Part("tensor", matrix.layer, index, (Slice(matrix.name, 0, 0, len(matrix.parameter)),))
        for index, matrix in enumerate(matrices)
    ]


def _by_layer(matrices: list[Matrix]) -> dict[int, dict[str, Matrix]]:
    """Matrices of known kind by block; of a block with two of a kind (experts), none of that kind."""
    found: dict[int, dict[str, Matrix]] = {}
    twice: set[tuple[int, str]] = set()
    for matrix in matrices:
        own = found.setdefault(matrix.layer, {})
        if matrix.kind in own:
            twice.add((matrix.layer, matrix.kind))
        if matrix.kind:
            own[matrix.kind] = matrix
    for layer, kind in twice:
        del found[layer][kind]
    return found
