"""From foreign tensors to one of our SAEs and back: conventions are settled here, and nowhere else."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.normalize import NONE
from sae.autoencoder.sae import SAE, SAEConfig, make
from sae.autoencoder.site import Site
from sae.errors import UserError


class Parts(NamedTuple):
    """The tensors of one SAE, in our layout and the source's conventions."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    takes_off_b_dec: bool
    """Whether b_dec is subtracted from the input before the encoder."""
    sparsity: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    """State of the architecture, by the names of its parameters and buffers: `threshold`, `log_gain`, ..."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None


def assemble(
    parts: Parts,
    *,
    architecture: str,
    hook_name: str,
    lm_name: str,
    l0: float | int = 0,
    normalize: str = NONE,
    options: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    source_widths: list[int] | None = None,
) -> SAE:
    """Make the SAE. Where only one of our kind of SAE and the source takes b_dec off the input, b_enc makes up for it.

    Args:
        parts: the tensors.
        architecture: a name in `sparsity.ARCHITECTURES`.
        hook_name: hook point or site.
        lm_name: the language model's name.
        l0: latents active on a token; k of the TopK kind; 0 when unknown.
        normalize: see `sae.autoencoder.normalize`.
        options: of the architecture.
        metadata: where it comes from; plain JSON types.
        source_widths: of a crosscoder's sources.

    Raises:
        UserError: shapes that do not fit each other.
    """
    d_in, d_sae = parts.W_enc.shape
    expected = {"W_dec": (d_sae, parts.b_dec.numel()), "b_enc": (d_sae,)}
    for name, shape in expected.items():
        found = tuple(getattr(parts, name).shape)
        if found != shape:
            raise UserError(f"{name} is {list(found)} where {list(shape)} fits the other tensors: is the format right?")
    d_out = parts.b_dec.numel()
    kind = Site.parse(hook_name).kind
    if kind == "sae" and d_out != d_in:
        raise UserError(f"it reads {d_in} wide and writes {d_out}: a transcoder's hook_name is 'read->write'.")
    config = SAEConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        l0=l0,
        seed=0,
        hook_name=hook_name,
        lm_name=lm_name,
        d_out=d_out if kind == "transcoder" and d_out != d_in else 0,
        source_widths=source_widths or [],
        skip=parts.W_skip is not None,
        normalize=normalize,
        options=options or {},
        metadata=metadata or {},
    )
    with torch.no_grad():
        sae = make(config)
        b_enc = _rebias(parts, sae.centres)
        state = {"W_enc": parts.W_enc, "W_dec": parts.W_dec, "b_enc": b_enc, "b_dec": parts.b_dec}
        state |= {f"sparsity.{name}": tensor for name, tensor in parts.sparsity.items()}
        if parts.W_skip is not None:
            state["W_skip"] = parts.W_skip
        own = sae.state_dict()
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(
                    f"{name} of shape {list(tensor.shape)} has no place in a {architecture} SAE of these sizes."
                )
        sae.load_state_dict(own | {name: tensor.float() for name, tensor in state.items()})
    return sae.eval()


def take_apart(sae: SAE, *, takes_off_b_dec: bool) -> Parts:
    """An SAE's tensors in fp32 on the CPU, for a format that takes b_dec off the input or does not.

    Args:
        sae: an SAE or transcoder.
        takes_off_b_dec: what the format does; b_enc makes up for the difference.

    Raises:
        UserError: weights that are not finite, or b_dec of another width than the input that it is to be taken off.
    """
    state = {name: tensor.detach().cpu().float() for name, tensor in sae.finite_state().items()}
    own = {name.removeprefix("sparsity."): tensor for name, tensor in state.items() if name.startswith("sparsity.")}
    parts = Parts(state["W_enc"], state["W_dec"], state["b_enc"], state["b_dec"], sae.centres, own, state.get("W_skip"))
    return parts._replace(b_enc=_rebias(parts, takes_off_b_dec), takes_off_b_dec=takes_off_b_dec)


def check_writable(sae: SAE, library: str) -> None:
    """Refuse what no library but this one knows: crosscoders, SAEs that normalise tokens, outputs of another width.

    Raises:
        UserError: naming it.
    """
    config = sae.config
    wrong = {
        f"{sae.kind}s": sae.kind == "crosscoder",
        f"SAEs that normalise each token (normalize = {config.normalize!r})": config.normalize != NONE,
        f"transcoders from {config.d_in} wide to {config.width_out}": config.width_out != config.d_in,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise UserError(f"{library} has no {what}: keep {config.hook_name!r} in this package's own format.")


def _rebias(parts: Parts, takes_off_b_dec: bool) -> Tensor:
    """b_enc for an encoder that is given x - b_dec, or x, whatever the parts' own is given: pre_acts stay the same."""
    if parts.takes_off_b_dec == takes_off_b_dec:
        return parts.b_enc.float()
    if parts.W_enc.shape[0] != parts.b_dec.numel():
        raise UserError("b_dec cannot be taken off an input of another width: is the format right?")
    shift = parts.b_dec.double() @ parts.W_enc.double()
    return (parts.b_enc.double() + (shift if takes_off_b_dec else -shift)).float()
