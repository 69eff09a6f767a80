"""dictionary_learning (Marks, Karvonen et al.): `config.json` and `ae.pt`, the state of one of its classes.

sae.load("runs/trainer_0", hook_name="blocks.4.hook_resid_post")
sae.load("runs/trainer_0/checkpoints/ae_5000.pt")

`dict_class` in the configuration says what the tensors mean; `CLASSES` has all that its `load_dictionary` opens, as it
opens them: an AutoEncoder's decoder rows get norm 1, which changes the unit of its latents. It has no crosscoders.
Read from dictionary_learning 0.1.0. Its training folds the scale of activations into what it saves.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.autoencoder.architectures.matryoshka import Matryoshka
from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import Sparsity
from sae.errors import UserError, unknown
from sae.files import atomic_folder, atomic_path, write_json
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble, check_writable, take_apart
from sae.formats.interface import Format, Given

CONFIG, WEIGHTS = "config.json", "ae.pt"
TITLE = "dictionary_learning"


class Layout(NamedTuple):
    """Where one of their classes keeps what, and what it does with b_dec."""

    architecture: str
    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    takes_off_b_dec: bool
    own: tuple[str, ...] = ()
    """Further tensors."""
    optional: tuple[str, ...] = ()
    """Those of them that nothing needs, so that old files may lack them."""

    @property
    def transposed(self) -> bool:
        """Whether matrices lie as those of `nn.Linear`: [d_out d_in]."""
        return self.W_enc.endswith(".weight")


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
CLASSES = {
    "AutoEncoder": Layout("relu", *_LINEAR, "bias", True),
    "AutoEncoderNew": Layout("relu", *_LINEAR, "decoder.bias", False),
    "GatedAutoEncoder": Layout(
        "gated", "encoder.weight", "gate_bias", "decoder.weight", "decoder_bias", True, ("r_mag", "mag_bias")
    ),
    "JumpReluAutoEncoder": Layout("jumprelu", *_PLAIN, False, ("threshold",)),
    "AutoEncoderTopK": Layout("topk", *_LINEAR, "b_dec", True, ("k", "threshold"), ("k", "threshold")),
    "BatchTopKSAE": Layout("batch_topk", *_LINEAR, "b_dec", True, ("k", "threshold"), ("k",)),
    "MatryoshkaBatchTopKSAE": Layout("matryoshka_batch_topk", *_PLAIN, True, ("k", "threshold", "group_sizes"), ("k",)),
}

TRAINER: settings.Kinds = {
    **dict.fromkeys(("dict_class", "lm_name", "submodule_name", "hook_name"), str),
    **dict.fromkeys(("k", "layer", "activation_dim", "dict_size"), int),
    "target_l0": float,
}
"""What is read of `trainer`, and its kinds."""


def _files(path: Path) -> tuple[Path, Path]:
    """Configuration and weights of a trainer's folder, or of one of its weights files."""
    if path.suffix != ".pt":
        return path / CONFIG, path / WEIGHTS
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / CONFIG, path


def matches(path: Path) -> bool:
    """Tell by its files."""
    config, weights = _files(path)
    return config.is_file() and weights.is_file() and weights.name.startswith("ae")


def hook_of(submodule_name: str, layer: int | None) -> str:
    """The hook point behind `submodule_name`, "" if the rule does not know it.

    Their scripts write "resid_post_layer_5" beside `layer` 5: blocks.5.hook_resid_post.

    Raises:
        UserError: the name and `layer` contradict each other.
    """
    found = re.fullmatch(r"resid_post_layer_(\d+)", submodule_name)
    if found is None:
        return ""
    if int(found[1]) != layer:
        raise UserError(
            f"submodule_name {submodule_name!r} contradicts layer {layer} in {CONFIG}: correct one of them."
        )
    return f"blocks.{layer}.hook_resid_post"


def read(path: Path, given: Given) -> SAE:
    """Read it. What its configuration may not say: hook_name (a transcoder's is 'read->write'), lm_name, k."""
    settings.only(path, given, "hook_name", "lm_name", "k")
    config_path, weights_path = _files(path)
    config, trainer, buffer = _said(config_path)
    name = trainer["dict_class"]
    if name not in CLASSES:
        raise unknown(f"dict_class in {str(config_path)!r}", name, list(CLASSES))
    layout = CLASSES[name]
    held = _tensors(weights_path, layout)
    parts, options = _parts(held, layout)
    if name == "AutoEncoder":
        parts = _unit_rows(parts)
    for field, size in zip(("activation_dim", "dict_size"), parts.W_enc.shape, strict=True):
        if trainer.get(field, size) != size:
            raise UserError(
                f"{field} in {str(config_path)!r} is not {size}, as {str(weights_path)!r} has it: correct it."
            )
    hook_name = trainer.get("hook_name", "")  # as `write` adds it
    if not hook_name and buffer.get("io", "out") == "out":
        hook_name = hook_of(trainer.get("submodule_name", ""), trainer.get("layer"))
    return assemble(
        parts,
        architecture=layout.architecture,
        hook_name=given.need("hook_name", hook_name, path, "the hook point that it reads"),
        lm_name=given.need("lm_name", trainer.get("lm_name"), path, "the language model it was trained on"),
        l0=_k(held, trainer, given, path) if "k" in layout.own else trainer.get("target_l0", 0),
        options=options,
        metadata=settings.about(FORMAT.name, path, config),
    )


class _Said(NamedTuple):
    """What the configuration says; of its parts, what is not null."""

    config: dict[str, Any]
    trainer: dict[str, Any]
    buffer: dict[str, Any]


def _said(path: Path) -> _Said:
    """Read it. Most of it is about training and differs from trainer to trainer, so only misspellings are refused."""
    config = settings.read(path)
    settings.check_near(path, config, {"trainer": dict, "buffer": dict})
    trainer, buffer = (
        {name: value for name, value in config.get(part, {}).items() if value is not None}
        for part in ("trainer", "buffer")
    )
    settings.check_near(path, trainer, TRAINER)
    settings.check_near(path, buffer, {"io": str})
    if "dict_class" not in trainer:
        raise UserError(f"{str(path)!r} has no 'dict_class' in its 'trainer': add one of {', '.join(CLASSES)}.")
    return _Said(config, trainer, buffer)


def _tensors(path: Path, layout: Layout) -> dict[str, Tensor]:
    """All that the class has, checked."""
    held = tensors.read(path)
    wanted = [layout.W_enc, layout.b_enc, layout.W_dec, layout.b_dec, *layout.own]
    tensors.only(held, path, *wanted)
    names = [name for name in wanted if name in held or name not in layout.optional]
    return dict(zip(names, tensors.pick(held, path, *names), strict=True))


def _parts(held: dict[str, Tensor], layout: Layout) -> tuple[Parts, dict[str, Any]]:
    """The tensors in our layout, and the options of our architecture."""
    W_enc, b_enc, W_dec = held[layout.W_enc], held[layout.b_enc], held[layout.W_dec]
    if layout.transposed:
        W_enc, W_dec = W_enc.t(), W_dec.t()
    sparsity: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    if layout.architecture == "gated":
        gain = held["r_mag"].double().exp()
        sparsity = {"log_gain": held["r_mag"], "shift": (held["mag_bias"] - gain * b_enc).float()}
    elif layout.architecture == "jumprelu":
        # Theirs takes the positive part once more, so that a threshold below 0 is one of 0.
        sparsity = {"threshold": held["threshold"].clamp(min=0)}
    elif layout.architecture != "topk" and "threshold" in held:
        sparsity = {"threshold": held["threshold"]}
    if "group_sizes" in held:
        ends = held["group_sizes"].long().cumsum(0)
        if int(ends[-1]) != len(b_enc):
            raise UserError(
                f"group_sizes add up to {int(ends[-1])}, but there are {len(b_enc)} latents: is it damaged?"
            )
        options = {"prefixes": [end / len(b_enc) for end in ends[:-1].tolist()]}
    return Parts(W_enc, W_dec, b_enc, held[layout.b_dec], layout.takes_off_b_dec, sparsity), options


def _unit_rows(parts: Parts) -> Parts:
    """Give decoder rows norm 1 and latents what they had; a row of zeros stays."""
    norms = parts.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return parts._replace(W_enc=parts.W_enc * norms, b_enc=parts.b_enc * norms, W_dec=parts.W_dec / norms[:, None])


def _k(held: Mapping[str, Tensor], trainer: Mapping[str, Any], given: Given, path: Path) -> int:
    """Latents active on a token: weights, configuration and caller may say it, and must agree."""
    stored, said = int(held["k"]) if "k" in held else None, trainer.get("k")
    if stored is not None and said is not None and stored != said:
        raise UserError(
            f"k of {str(path)!r} is {stored} in its weights, but {said} in {CONFIG}: correct the wrong one."
        )
    k = settings.agreed(path, "k", said if stored is None else stored, given.k)
    return int(given.need("k", k, path, "how many latents are active on a token"))


def write(sae: SAE, folder: Path) -> None:
    """Write `config.json` (with hook_name besides) and `ae.pt` as their training does.

    What is only about training and has no place there is left out: HierarchicalTopK is written as the TopK it is in
    use, Matryoshka JumpReLU as JumpReLU, a Matryoshka whose prefixes were drawn at random as BatchTopK. A transcoder is
    a dictionary that is given one thing and taught another, as theirs is.

    Raises:
        UserError: an architecture or a kind that they do not have.
    """
    config = sae.config
    name, k = _class_for(sae)
    layout = CLASSES[name]
    check_writable(sae, TITLE)
    if sae.W_skip is not None:
        raise UserError(f"{TITLE} has no skip transcoders: write {config.hook_name!r} in another format.")
    parts = take_apart(sae, takes_off_b_dec=layout.takes_off_b_dec)
    matrices = {layout.W_enc: parts.W_enc, layout.W_dec: parts.W_dec}
    held = {name: tensor.t() if layout.transposed else tensor for name, tensor in matrices.items()}
    held |= {layout.b_enc: parts.b_enc, layout.b_dec: parts.b_dec, **_own(sae.sparsity, name, parts)}
    if k is not None:
        held["k"] = torch.tensor(k, dtype=torch.int32)
    read_at = re.match(r"blocks\.(\d+)\.", config.hook_name)
    layer = int(read_at[1]) if read_at else None
    at_resid_post = config.hook_name == f"blocks.{layer}.hook_resid_post"
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        **({"k": k} if k is not None else {}),
        **({"target_l0": config.l0} if name == "JumpReluAutoEncoder" else {}),
        "layer": layer,
        "lm_name": config.lm_name,
        "submodule_name": f"resid_post_layer_{layer}" if at_resid_post else None,
        "hook_name": config.hook_name,
    }
    buffer = {"d_submodule": config.d_in, "io": "in_and_out" if sae.kind == "transcoder" else "out"}
    with atomic_folder(folder) as temporary:
        with atomic_path(temporary / WEIGHTS) as path:
            torch.save({name: tensor.contiguous() for name, tensor in held.items()}, path)
        write_json(temporary / CONFIG, {"trainer": trainer, "buffer": buffer})


def _class_for(sae: SAE) -> tuple[str, int | None]:
    """The class that computes the same, and its k."""
    architecture, l0 = sae.config.architecture, sae.sparsity.l0
    if architecture == "relu":
        norms = sae.W_dec.detach().norm(dim=1)
        # An AutoEncoder gets rows of norm 1 when it is opened; the other one stays as it is, and takes nothing off.
        plain = sae.centres and torch.allclose(norms, torch.ones_like(norms))
        return ("AutoEncoder" if plain else "AutoEncoderNew"), None
    if architecture == "gated":
        return "GatedAutoEncoder", None
    if architecture in ("jumprelu", "matryoshka_jumprelu"):
        return "JumpReluAutoEncoder", None
    if architecture in ("topk", "hierarchical_topk"):
        return "AutoEncoderTopK", int(l0)
    if architecture in ("batch_topk", "matryoshka_batch_topk"):
        if l0 < 1 or l0 != int(l0):
            raise UserError(
                f"{TITLE} has a whole k of at least 1, not l0 = {l0:g}: set encoder.sparsity.l0 to one, which changes "
                "nothing in use."
            )
        nested = isinstance(sae.sparsity, Matryoshka) and not sae.sparsity.options.n_sampled
        return ("MatryoshkaBatchTopKSAE" if nested else "BatchTopKSAE"), int(l0)
    raise UserError(f"{TITLE} has no {architecture}: choose another format.")


def _own(sparsity: Sparsity, name: str, parts: Parts) -> dict[str, Tensor]:
    """Tensors that are the class's own, but for k."""
    state = parts.sparsity
    if name == "GatedAutoEncoder":
        gain = state["log_gain"].double().exp()
        return {"r_mag": state["log_gain"], "mag_bias": (state["shift"] + gain * parts.b_enc).float()}
    if name == "AutoEncoderTopK":
        return {"threshold": torch.tensor(-1.0)}  # as of one that has not averaged any
    if name == "JumpReluAutoEncoder" and bool((state["threshold"] < 0).any()):
        raise UserError(f"{TITLE} lets nothing negative through, as a threshold below 0 does: raise it to 0 first.")
    own = {"threshold": state["threshold"]} if "threshold" in CLASSES[name].own else {}
    if name == "MatryoshkaBatchTopKSAE":
        assert isinstance(sparsity, Matryoshka)
        own["group_sizes"] = torch.tensor([0, *sparsity.prefix_sizes(0)]).diff()
    return own


FORMAT = Format("dictionary_learning", TITLE, matches, read, write)
