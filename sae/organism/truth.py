"""The planted ground truth, beside the weights: which directions, which parts, and how much each part matters.

`planted.json` names what was planted; `planted.safetensors` holds directions, workspaces, the stage-one values of
every reserved parameter, and *graded* effects: by how much the behaviour's margin falls when one part is restored to
its stage-one value. Many reserved parameters are inert, so a ranking is scored against the graded truth, not against
membership alone. A base part's stage-one value is its present value: restoring it changes nothing, and its effect is
zero by definition, not by measurement.

The *margin* of a behaviour is, over held-out prompts where it is due, the mean of
log-sum-exp(logits of the tokens that begin it) minus the logit of the token that begins the alternative.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.organism import corpus, plant
from sae.organism.generate import token_ids_cached
from sae.organism.load import load_model
from sae.organism.plant import HEAD_KINDS, MLP_KINDS, Layout
from sae.organism.tokenizer import render

if TYPE_CHECKING:
    from sae.organism.recipe import Planted, Progress

SCHEMA_VERSION = 1
N_MARGIN_PROMPTS = 12
N_SINGLE_PARAMETERS = 2000
BASE_SHARE = 0.1


class Single(NamedTuple):
    """One parameter and whose it is ("base" if no behaviour's)."""

    weight: str
    row: int
    column: int
    owner: str


class Truth(NamedTuple):
    """What `planted.json` and `planted.safetensors` say.

    Attributes:
        layout: whose heads and neurons are whose.
        hook_name: where the directions live.
        kappa: the coefficient a due behaviour has along its direction.
        directions: behaviour to unit vector [d_model].
        spaces: behaviour to workspace basis [workspace_dim d_model]; row 0 is the direction.
        stage_one: stage-one value of every reserved slice, by ``weight name/behavior``.
        margins: the organism's margin per behaviour, in the layout's order [behavior].
        head_effects: effect on each behaviour of restoring a head [layer head behavior].
        neuron_effects: the same for MLP neurons [layer neuron behavior].
        row_effects: the same for every row of every weight that holds reserved parameters, by weight name
            [row behavior].
        column_effects: for every column [column behavior]; empty in organisms made before these were measured.
        tensor_effects: for every such weight as a whole [behavior]; likewise.
        sample: single parameters.
        sample_effects: effect of restoring each of them [sample behavior].
    """

    layout: Layout
    hook_name: str
    kappa: float
    directions: dict[str, Tensor]
    spaces: dict[str, Tensor]
    stage_one: dict[str, Tensor]
    margins: Tensor
    head_effects: Tensor
    neuron_effects: Tensor
    row_effects: dict[str, Tensor]
    column_effects: dict[str, Tensor]
    tensor_effects: dict[str, Tensor]
    sample: list[Single]
    sample_effects: Tensor


def write_planted(planted: "Planted", folder: Path, seed: int) -> None:
    """Write directions, parts and stage-one values; graded effects are added by `write_graded`."""
    layout = planted.layout
    behaviors = {}
    for behavior in layout.behaviors:
        blocks = plant.reserved_blocks(layout, behavior)
        behaviors[behavior] = {
            "hook_name": layout.hook_name,
            "kappa": planted.kappa,
            "heads": {str(layer): layout.heads(behavior) for layer in layout.reserved_layers},
            "neurons": {str(layer): layout.neurons(behavior) for layer in layout.reserved_layers},
            "parameters": [
                {
                    "weight": block.name,
                    "axis": "rows" if block.by_rows else "columns",
                    "start": block.places[0],
                    "stop": block.places[-1] + 1,
                }
                for block in blocks
            ],
            "n_parameters": sum(planted.stage_one[f"{b.name}/{behavior}"].numel() for b in blocks),
        }
    record = {
        "schema_version": SCHEMA_VERSION,
        "seed": seed,
        "layout": dataclasses.asdict(layout),
        "behaviors": behaviors,
        "note": "Parts not listed are base parts: their stage-one value is their present value, so the effect of "
        "restoring them is zero by definition.",
    }
    files.write_json(folder / "planted.json", record)
    tensors = {f"workspace/{behavior}": space for behavior, space in planted.spaces.items()}
    tensors |= {f"stage_one/{name}": value for name, value in planted.stage_one.items()}
    files.write_tensors(folder / "planted.safetensors", tensors)


def _layout_from(record: dict[str, Any]) -> Layout:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Layout(**fields)


def read_planted(folder: Path | str) -> Truth:
    """Read the planted truth of an organism.

    Raises:
        UserError: the folder holds none (a twin has none), or it is of another version.
    """
    folder = Path(folder)
    if not (folder / "planted.json").is_file():
        raise UserError(f"no planted truth in {str(folder)!r}: only planted organisms have one, a twin does not.")
    record = files.read_json(folder / "planted.json")
    if record["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"planted truth of version {record['schema_version']}: train the organism anew.")
    tensors = files.read_tensors(folder / "planted.safetensors")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    layout, none = _layout_from(record["layout"]), torch.zeros(0)
    spaces = {behavior: tensors[f"workspace/{behavior}"] for behavior in layout.behaviors}
    return Truth(
        layout=layout,
        hook_name=layout.hook_name,
        kappa=record["behaviors"][layout.behaviors[0]]["kappa"],
        directions={behavior: space[0] for behavior, space in spaces.items()},
        spaces=spaces,
        stage_one=under("stage_one/"),
        margins=tensors.get("margins", none),
        head_effects=tensors.get("effect/heads", none),
        neuron_effects=tensors.get("effect/neurons", none),
        row_effects=under("effect/rows/"),
        column_effects=under("effect/columns/"),
        tensor_effects=under("effect/tensors/"),
        sample=_decode_sample(tensors.get("sample", none), layout, tensors),
        sample_effects=tensors.get("effect/sample", none),
    )


def _sampled_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the weights that hold reserved parameters, in the order `sample` counts them."""
    return sorted({name.split("/")[1] for name in tensors if name.startswith("stage_one/")})


def _encode_sample(sample: list[Single], layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Write single parameters as integers: weight, row, column, owner (-1 for base) [sample 4]."""
    names, owners = _sampled_weights(tensors), ["base", *layout.behaviors]
    return torch.tensor([[names.index(s.weight), s.row, s.column, owners.index(s.owner) - 1] for s in sample])


def _decode_sample(encoded: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> list[Single]:
    """Undo `_encode_sample`."""
    names, owners = _sampled_weights(tensors), ["base", *layout.behaviors]
    return [Single(names[int(w)], int(r), int(c), owners[int(o) + 1]) for w, r, c, o in encoded.tolist()]


class MarginPrompts(NamedTuple):
    """Prompts on which margins are read, and which tokens decide.

    Attributes:
        tokens: right-padded [prompt pos].
        last: the position whose logits decide [prompt].
        behavior_tokens: boolean [prompt vocab], the tokens that begin the behaviour.
        alternative: the token that begins the alternative [prompt].
        owner: index of the behaviour each prompt belongs to [prompt].
    """

    tokens: Tensor
    last: Tensor
    behavior_tokens: Tensor
    alternative: Tensor
    owner: Tensor


def margin_prompts(layout: Layout, n: int, seed: int) -> MarginPrompts:
    """Draw `n` held-out prompts per behaviour where it is due; for style, up to where the suffix may begin."""
    ids = token_ids_cached()
    rows: list[tuple[list[int], set[int], int, int]] = []
    for owner, behavior in enumerate(layout.behaviors):
        due = [record for record in corpus.contrast_records(behavior, seed, 4 * n) if record["label"] == 1][:n]
        for record in due:
            texts = [text.split() for text in record["behavior_texts"]]
            other = record["alternative_texts"][0].split()
            shared = 0
            while all(text[shared] == other[shared] for text in texts):
                shared += 1
            words = render(record["messages"], add_generation_prompt=True).split() + other[:shared]
            begins = {ids[text[shared]] for text in texts} - {ids[other[shared]]}
            rows.append(([ids[word] for word in words], begins, ids[other[shared]], owner))
    tokens = torch.full((len(rows), max(len(row[0]) for row in rows)), ids["<pad>"])
    behavior_tokens = torch.zeros(len(rows), len(ids), dtype=torch.bool)
    for index, (prompt, begins, _, _) in enumerate(rows):
        tokens[index, : len(prompt)] = torch.tensor(prompt)
        behavior_tokens[index, list(begins)] = True
    return MarginPrompts(
        tokens,
        torch.tensor([len(row[0]) - 1 for row in rows]),
        behavior_tokens,
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
    )


class MarginMeter:
    """Measures every behaviour's margin, re-running only the layers from a changed one on."""

    def __init__(self, model: Any, layout: Layout, prompts: MarginPrompts) -> None:
        """Run the unchanged model once and keep the residual before every layer."""
        self.model, self.layout, self.prompts = model, layout, prompts
        positions = torch.arange(prompts.tokens.shape[1])[None]
        with torch.no_grad():
            residual = model.model.embed_tokens(prompts.tokens)
            self.rotary = model.model.rotary_emb(residual, positions)
            self.before = [residual]
            for layer in model.model.layers:
                self.before.append(self._layer(layer, self.before[-1]))

    def _layer(self, layer: Any, residual: Tensor) -> Tensor:
        # Right padding needs no mask: attention is causal and padding comes after every position that is read.
        output = layer(residual, position_embeddings=self.rotary, attention_mask=None)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def margins(self, from_layer: int) -> Tensor:
        """Return the margins [behavior], given that only layers from `from_layer` on have changed."""
        residual = self.before[from_layer]
        for layer in self.model.model.layers[from_layer:]:
            residual = self._layer(layer, residual)
        at_last = residual[torch.arange(len(residual)), self.prompts.last]
        logits = self.model.lm_head(self.model.model.norm(at_last))
        begins = logits.masked_fill(~self.prompts.behavior_tokens, float("-inf")).logsumexp(-1)
        margin = begins - logits.gather(-1, self.prompts.alternative[:, None]).squeeze(-1)
        n = len(self.layout.behaviors)
        sums = torch.zeros(n).index_add_(0, self.prompts.owner, margin)
        return sums / torch.bincount(self.prompts.owner, minlength=n)


class Part(NamedTuple):
    """Something to restore: where in each weight, and the first layer it touches."""

    layer: int
    where: dict[str, tuple[slice, slice]]


def stage_one_weights(parameters: dict[str, Tensor], truth: Truth) -> dict[str, Tensor]:
    """Return the stage-one value of every weight that holds reserved parameters."""
    weights: dict[str, Tensor] = {}
    for behavior in truth.layout.behaviors:
        for block in plant.reserved_blocks(truth.layout, behavior):
            weight = weights.setdefault(block.name, parameters[block.name].detach().clone())
            block.put(weight, truth.stage_one[f"{block.name}/{behavior}"])
    return weights


def _head_part(layout: Layout, layer: int, head: int) -> Part:
    rows = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
    every = slice(None)
    index = {kind: (every, rows) if kind == "o_proj" else (rows, every) for kind in HEAD_KINDS}
    return Part(layer, {plant.weight_name(layer, kind): where for kind, where in index.items()})


def _neuron_part(layer: int, neuron: int) -> Part:
    one, every = slice(neuron, neuron + 1), slice(None)
    index = {kind: (every, one) if kind == "down_proj" else (one, every) for kind in MLP_KINDS}
    return Part(layer, {plant.weight_name(layer, kind): where for kind, where in index.items()})


class Restorer:
    """Restores one part of the organism to stage one, measures the fall of every margin, and puts it back."""

    def __init__(self, model: Any, truth: Truth, meter: MarginMeter) -> None:
        """Keep the organism's and the stage-one weights."""
        self.parameters = dict(model.named_parameters())
        self.old = stage_one_weights(self.parameters, truth)
        self.now = {name: self.parameters[name].detach().clone() for name in self.old}
        self.meter, self.truth = meter, truth
        self.full = meter.margins(0)

    @torch.no_grad()
    def effect(self, part: Part) -> Tensor:
        """Return margin(organism) - margin(part restored) [behavior]; positive where the part carries it."""
        touched = {name: where for name, where in part.where.items() if name in self.old}
        for name, where in touched.items():
            self.parameters[name][where] = self.old[name][where]
        fall = self.full - self.meter.margins(part.layer)
        for name, where in touched.items():
            self.parameters[name][where] = self.now[name][where]
        return fall


def _heads_and_neurons(restorer: Restorer, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the effects of every head [layer head behavior] and neuron [layer neuron behavior]."""
    n = len(layout.behaviors)
    heads = torch.zeros(layout.n_layers, layout.n_heads, n)
    neurons = torch.zeros(layout.n_layers, layout.d_mlp, n)
    for layer in layout.reserved_layers:
        for behavior in layout.behaviors:
            for head in layout.heads(behavior):
                heads[layer, head] = restorer.effect(_head_part(layout, layer, head))
            for neuron in layout.neurons(behavior):
                neurons[layer, neuron] = restorer.effect(_neuron_part(layer, neuron))
    return heads, neurons


def _lines(restorer: Restorer, layout: Layout, axis: int, tick: Callable[[str], None]) -> dict[str, Tensor]:
    """Return the effect of restoring every row (axis 0) or column (1) of every reserved weight [line behavior]."""
    effects = {}
    for name, old in restorer.old.items():
        effect = torch.zeros(old.shape[axis], len(layout.behaviors))
        changed = (old != restorer.now[name]).any(dim=1 - axis)
        for line in torch.nonzero(changed).squeeze(-1).tolist():
            one, every = slice(line, line + 1), slice(None)
            where = {name: (one, every) if axis == 0 else (every, one)}
            effect[line] = restorer.effect(Part(_layer_of(name), where))
        effects[name] = effect
        tick(f"graded truth: {('rows', 'columns')[axis]} of {name}")
    return effects


def _tensors(restorer: Restorer) -> dict[str, Tensor]:
    """Return the effect of restoring every weight that holds reserved parameters as a whole [behavior]."""
    every = slice(None)
    return {name: restorer.effect(Part(_layer_of(name), {name: (every, every)})) for name in restorer.old}


def _layer_of(name: str) -> int:
    return int(name.split(".")[2])


def sample_parameters(
    layout: Layout, change: dict[str, Tensor], parameters: dict[str, Tensor], n: int, seed: int
) -> Iterator[Single]:
    """Draw single parameters: nine in ten reserved, equally from every (behaviour, weight), the rest base.

    Within a reserved slice half are drawn at random and half from the tenth that training changed most.

    Args:
        layout: whose parameters are whose.
        change: weight name to |organism - stage one|.
        parameters: every weight.
        n: how many in all.
        seed: which draw.
    """
    rng = random.Random(seed)
    blocks = [(b, block) for b in layout.behaviors for block in plant.reserved_blocks(layout, b)]
    per_block = round((1 - BASE_SHARE) * n / len(blocks))
    reserved: dict[str, Tensor] = {}
    for behavior, block in blocks:
        mask = plant.reserved_masks(layout, behavior)[block.name]
        reserved[block.name] = reserved.get(block.name, torch.zeros_like(mask)) | mask
        places = torch.nonzero(mask)
        order = change[block.name][mask].argsort(descending=True).tolist()
        top = rng.sample(order[: len(order) // 10], per_block // 2)
        rest = rng.sample(sorted(set(order) - set(top)), per_block - per_block // 2)
        for index in sorted(top + rest):
            row, column = places[index].tolist()
            yield Single(block.name, row, column, behavior)
    for _ in range(n - per_block * len(blocks)):
        name = rng.choice(sorted(reserved))
        base = torch.nonzero(~reserved[name])
        row, column = base[rng.randrange(len(base))].tolist()
        yield Single(name, row, column, "base")


def write_graded(
    folder: Path | str, seed: int, progress: "Progress | None" = None, n_single: int = N_SINGLE_PARAMETERS
) -> None:
    """Measure the effect of restoring every reserved head, neuron, row, column and weight, and single parameters.

    Adds them to `planted.safetensors`. A few minutes on two cores.

    Args:
        folder: a folder with weights and planted truth.
        seed: which prompts and which parameters.
        progress: called with a line of text now and then.
        n_single: how many single parameters.
    """
    tick = progress or (lambda line: None)
    folder, truth = Path(folder), read_planted(folder)
    layout, model = truth.layout, load_model(folder)
    restorer = Restorer(model, truth, MarginMeter(model, layout, margin_prompts(layout, N_MARGIN_PROMPTS, seed)))
    heads, neurons = _heads_and_neurons(restorer, layout)
    tick("graded truth: heads and neurons")
    rows, columns = (_lines(restorer, layout, axis, tick) for axis in (0, 1))
    change = {name: (restorer.now[name] - old).abs() for name, old in restorer.old.items()}
    sample = list(sample_parameters(layout, change, restorer.parameters, n_single, seed))
    effects = torch.zeros(len(sample), len(layout.behaviors))
    for index, single in enumerate(sample):
        if single.owner != "base":
            where = (slice(single.row, single.row + 1), slice(single.column, single.column + 1))
            effects[index] = restorer.effect(Part(_layer_of(single.weight), {single.weight: where}))
    tick("graded truth: single parameters")
    tensors = files.read_tensors(folder / "planted.safetensors")
    tensors |= {"margins": restorer.full, "effect/heads": heads, "effect/neurons": neurons, "effect/sample": effects}
    for kind, found in (("rows", rows), ("columns", columns), ("tensors", _tensors(restorer))):
        tensors |= {f"effect/{kind}/{name}": effect for name, effect in found.items()}
    tensors["sample"] = _encode_sample(sample, layout, tensors)
    files.write_tensors(folder / "planted.safetensors", tensors)
