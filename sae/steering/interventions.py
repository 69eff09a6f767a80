"""What can be done to a residual stream: clamp, ablate, add, project out. Pure functions of activations, no hooks.

Every intervention has `apply_to(x, step) -> x`, which returns a new tensor, leaves tokens outside its scope bit for bit
alone, and never touches padding. Edits through an SAE move `x` along decoder rows only,

    x + (new_acts - acts) @ W_dec

so whatever the SAE does not reconstruct (the error term) passes through. Scope, the same for all of them:

- `positions`: a slice or list of token indices, counted from the first real token of the sequence (padding not
  counted), through the prompt and on into the generated text; or a callable on the step that returns `[batch pos]`
  booleans. Counting from the end makes no sense while text grows; use `roles`, or a callable.
- `roles`: the kinds of token (`Role`, or their names) to edit. None means every token but padding.

Use them with `sae.steering.apply.steer`.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError, unknown
from sae.lm.hooks import Step
from sae.steering.scope import Positions, as_roles, checked_positions, scope_mask

Number = float | int


@runtime_checkable
class EncoderLike(Protocol):
    """What an intervention needs of an SAE."""

    config: Any
    W_dec: Any

    def encode(self, x: Tensor) -> Tensor:
        """Map activations [... d_in] to latents [... d_sae]."""
        ...


def _vector(direction: Any, what: str) -> Float[Tensor, " d_in"]:
    vector = torch.as_tensor(direction).detach().to(torch.float32)
    if vector.ndim != 1:
        raise UserError(f"{what} must be one vector [d_in], got shape {list(vector.shape)}.")
    if not torch.isfinite(vector).all():
        raise UserError(f"{what} holds NaN or infinite values: check where it was computed.")
    return vector


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not torch.isfinite(torch.tensor(number)):
        raise UserError(f"{what} is {number}: give a finite number.")
    return number


def _checked_latents(encoder: EncoderLike, latents: int | Iterable[int]) -> tuple[int, ...]:
    kind = getattr(encoder, "kind", "sae")
    if kind != "sae":
        raise UserError(
            f"{encoder.config.hook_name!r} is the site of a {kind}: clamp and ablate in an SAE of one hook point."
        )
    d_sae = int(encoder.config.d_sae)
    try:
        # A zero-dimensional array or tensor looks iterable and is not.
        single = not isinstance(latents, Iterable) or getattr(latents, "ndim", None) == 0
        several: Iterable[Any] = [latents] if single else latents  # type: ignore[assignment]
        found = tuple(operator.index(latent) for latent in several)
    except TypeError:
        raise UserError(f"latents {latents!r} are not whole numbers: give indices such as 17 or [17, 402].") from None
    if not found:
        raise UserError("no latents given: name at least one.")
    for latent in found:
        if not 0 <= latent < d_sae:
            raise UserError(f"latent {latent} does not exist: this SAE has d_sae={d_sae}, latents 0 to {d_sae - 1}.")
    if len(set(found)) < len(found):
        raise UserError(f"latents {list(found)} repeat: name each once.")
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scoped:
    """Fields and masking shared by all interventions."""

    positions: Positions | None = None
    roles: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", checked_positions(self.positions))
        object.__setattr__(self, "roles", as_roles(self.roles))

    @property
    def encoder_used(self) -> EncoderLike | None:
        """The SAE this edit goes through, if any; `steer` checks that it belongs to the model."""
        return None

    @property
    def d_in(self) -> int:
        """Width of the activations this edits."""
        raise NotImplementedError

    @property
    def hook(self) -> str:
        """The hook point where this acts."""
        raise NotImplementedError

    def delta(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Return what would be added to every token, in float32, scope aside."""
        raise NotImplementedError

    def apply_to(self, x: Float[Tensor, "batch pos d_in"], step: Step | None) -> Float[Tensor, "batch pos d_in"]:
        """Return edited activations; tokens out of scope are bit for bit the same. `x` itself is not changed.

        Raises:
            UserError: a scope was given, but the forward call did not say what its tokens are (`step` is None).
        """
        if step is not None:
            mask = scope_mask(step, self.positions, self.roles).to(x.device)
        elif self.positions is None and self.roles is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            raise UserError(
                "an intervention scoped to positions or roles needs to know the tokens: run the model through "
                "lm.logits, lm.activations or lm.generate, not through its bridge."
            )
        if not mask.any():
            return x
        # Only the tokens in scope go through the SAE: encoding is the cost of an edit.
        rows = x[mask]
        edited = x.clone()
        edited[mask] = (rows.float() + self.delta(rows[None])[0]).to(x.dtype)
        return edited


@dataclass(frozen=True, eq=False)
class _OnLatents(_Scoped):
    encoder: EncoderLike

    @property
    def encoder_used(self) -> EncoderLike:
        return self.encoder

    @property
    def d_in(self) -> int:
        return int(self.encoder.config.d_in)

    @property
    def hook(self) -> str:
        return str(self.encoder.config.hook_name)

    def _move(self, x: Tensor, latents: tuple[int, ...], values: Tensor) -> Tensor:
        """Return (values - acts) @ W_dec over the chosen latents only."""
        # The SAE may live on another device than the model.
        device = self.encoder.W_dec.device
        index = torch.tensor(latents, device=device)
        acts = self.encoder.encode(x.to(device))[..., index].float()
        moved: Tensor = (values.to(device) - acts) @ self.encoder.W_dec.detach()[index].float()
        units = self.encoder.units(x.to(device)) if hasattr(self.encoder, "units") else None
        return (moved if units is None else moved * units.float()).to(x.device)


@dataclass(frozen=True, eq=False)
class Clamp(_OnLatents):
    """Set latents to fixed values on every token in scope, whether they were active or not.

    Args:
        encoder: the SAE.
        latent: one latent; or
        latents: several, clamped together.
        value: one number for all of them, or one per latent, in units of the latents' activations. 0 removes a latent,
            its typical active value makes the model see the feature everywhere, a negative value pushes against it.
        positions: see the module's text.
        roles: see the module's text.

    Raises:
        UserError: no such latent, a value that is not finite, as many values as latents not given.
    """

    latent: int | None = None
    value: Number | Sequence[Number] = 0.0
    latents: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.latent is None) == (self.latents is None):
            raise UserError("Clamp needs either latent=17 or latents=[17, 18].")
        chosen = self.latents if self.latents is not None else [self.latent]
        latents = _checked_latents(self.encoder, [item for item in chosen if item is not None])
        given: Any = self.value
        if isinstance(given, Tensor):
            given = given.tolist()
        values = list(given) if isinstance(given, Iterable) else [given] * len(latents)
        if len(values) != len(latents):
            raise UserError(f"{len(values)} values for {len(latents)} latents: give one value, or one per latent.")
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "value", tuple(_finite(value, "the clamp's value") for value in values))

    def delta(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Return (value - acts) @ W_dec over the clamped latents."""
        assert isinstance(self.latents, tuple)
        assert isinstance(self.value, tuple)
        return self._move(x, self.latents, torch.tensor(self.value))


@dataclass(frozen=True, eq=False)
class Ablate(_OnLatents):
    """Remove latents: set them to zero, or to their mean activation.

    Args:
        encoder: the SAE.
        latents: which ones (an int is one).
        mode: ``"zero"`` or ``"mean"``.
        mean: for ``"mean"``: the mean activations, `[d_sae]` or one per latent.
        positions: see the module's text.
        roles: see the module's text.

    Raises:
        UserError: no such latent or mode, or a mean missing, not finite, or of another length.
    """

    latents: Sequence[int] | int
    mode: str = "zero"
    mean: Any = None
    _values: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        latents = _checked_latents(self.encoder, self.latents)
        object.__setattr__(self, "latents", latents)
        if self.mode not in ("zero", "mean"):
            raise unknown("ablation mode", self.mode, ["zero", "mean"])
        values = torch.zeros(len(latents))
        if self.mode == "mean":
            if self.mean is None:
                raise UserError("mode='mean' needs mean=: the latents' mean activations [d_sae] over typical text.")
            values = _vector(self.mean, "mean")
            if len(values) == int(self.encoder.config.d_sae):
                values = values[list(latents)]
            if len(values) != len(latents):
                raise UserError(f"mean has {len(values)} entries: give d_sae of them, or one per latent.")
        object.__setattr__(self, "_values", values)

    def delta(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Return (0 or mean - acts) @ W_dec over the ablated latents."""
        assert isinstance(self.latents, tuple)
        return self._move(x, self.latents, self._values)


@dataclass(frozen=True, eq=False)
class Add(_Scoped):
    """Add `scale * direction` to every token in scope; steering along a vector.

    Args:
        direction: `[d_in]`, used at the length given (a difference of means has its own natural length); or
        encoder, latent: the decoder row of a latent.
        scale: multiplies the direction; negative steers away.
        hook_name: where; defaults to the SAE's hook point.
        positions: see the module's text.
        roles: see the module's text.

    Raises:
        UserError: neither or both sources, no hook name, a direction or scale that is not finite.
    """

    direction: Any = None
    scale: Number = 1.0
    hook_name: str | None = None
    encoder: EncoderLike | None = None
    latent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.direction is None) == (self.encoder is None) or (self.encoder is None) != (self.latent is None):
            raise UserError("Add needs either direction=, or encoder= and latent=.")
        direction, hook_name = self.direction, self.hook_name
        if self.encoder is not None and self.latent is not None:
            (latent,) = _checked_latents(self.encoder, [self.latent])
            direction = self.encoder.W_dec[latent]
            hook_name = hook_name or str(self.encoder.config.hook_name)
        if not hook_name:
            raise UserError("Add along a direction needs hook_name=, e.g. 'blocks.2.hook_resid_post'.")
        object.__setattr__(self, "direction", _vector(direction, "the direction"))
        object.__setattr__(self, "scale", _finite(self.scale, "the scale"))
        object.__setattr__(self, "hook_name", hook_name)

    @property
    def encoder_used(self) -> EncoderLike | None:
        """The SAE whose decoder row is added, if any."""
        return self.encoder

    @property
    def d_in(self) -> int:
        """Length of the direction."""
        return len(self.direction)

    @property
    def hook(self) -> str:
        """The hook point."""
        assert self.hook_name is not None
        return self.hook_name

    def delta(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Return the same vector for every token."""
        moved: Tensor = (self.scale * self.direction).to(x.device).expand(x.shape)
        return moved


@dataclass(frozen=True, eq=False)
class ProjectOut(_Scoped):
    """Set the coefficient along a direction to a constant: x + (toward - x . u) u, with u the unit vector.

    With `toward=0` the direction is deleted. Zero is often not neutral, though: the coefficient of ordinary prompts
    has a mean far from zero, and deleting it both leaves part of a behaviour and disturbs ordinary prompts.
    `toward` at the harmless prompts' mean coefficient avoids that (`sae.behavior.directions` computes it).

    Args:
        direction: `[d_in]`, of any length but zero.
        hook_name: where.
        toward: the coefficient to set, in the units of the activations.
        positions: see the module's text.
        roles: see the module's text.

    Raises:
        UserError: a direction that is zero or not finite, a coefficient that is not finite.
    """

    direction: Any
    hook_name: str
    toward: Number = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        vector = _vector(self.direction, "the direction")
        if float(vector.norm()) == 0.0:
            raise UserError("the direction to project out is zero: there is nothing to remove.")
        object.__setattr__(self, "direction", vector / vector.norm())
        object.__setattr__(self, "toward", _finite(self.toward, "the coefficient `toward`"))

    @property
    def d_in(self) -> int:
        """Length of the direction."""
        return len(self.direction)

    @property
    def hook(self) -> str:
        """The hook point."""
        return self.hook_name

    def delta(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Return (toward - x . u) u."""
        unit = self.direction.to(x.device)
        moved: Tensor = (self.toward - x.float() @ unit)[..., None] * unit
        return moved


Intervention = Clamp | Ablate | Add | ProjectOut
