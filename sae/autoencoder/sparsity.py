"""What makes an SAE sparse: the interface of architectures, and how they are found by name.

An architecture says how pre-activations become latent activations, in training and at inference, which penalty (if
any) drives the mean number of active latents to the target L0, and how its own state (thresholds, controllers) moves.
All state lives in buffers and parameters, so checkpoints carry it. The same class serves training and inference.

The ones that come with the package are in `sae/autoencoder/architectures`, a file each. To add one from outside:
subclass `Sparsity`, set `name`, override what differs (often only `activate`) and call `register`. Training then takes
the dense path; overriding `select` as well opens the sparse one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.errors import UserError, unknown
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels

if TYPE_CHECKING:
    from sae.autoencoder.sae import SAE


@dataclass(frozen=True)
class Options:
    """Training knobs of an architecture. Lengths are in normalised units, where E||x||^2 = d_in.

    Subclasses add fields, each with a default, and check them in `__post_init__`, which calls that of `super()`.
    """

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""


@dataclass(frozen=True)
class Schedule:
    """What an architecture knows of the run that trains it."""

    n_steps: int = 0
    """Length of the run; 0 outside of training."""
    warmup_steps: int = 0
    """Steps over which the penalty grows from 0."""
    seed: int = 0
    """Of the SAE."""

    def warmup(self, step: int) -> float:
        """Fraction of the penalty in force at this step."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


class Active(NamedTuple):
    """The latent activations of one training batch, as a dense matrix or as its entries only."""

    pre_acts: Tensor
    """[n] at the entries, or [batch d_sae]."""
    latent_acts: Tensor
    """Same shape as `pre_acts`. What is not listed is zero and has no gradient."""
    cols: Tensor | slice
    """The latent of each entry, or `slice(None)` when dense: a per-latent tensor is looked up as `tensor[cols]`."""
    batch_tokens: int
    d_in: int


class Levels(NamedTuple):
    """A reconstruction that is to be good at several stages: stage l uses the activations of levels 0 to l."""

    of: Int[Tensor, "*shape"]
    """Level of each entry ([n]), or when dense of each latent ([d_sae]) or element ([batch d_sae])."""
    weights: tuple[float, ...]
    """What the error of each stage counts; they sum to 1."""


class BatchStats(NamedTuple):
    """What a batch did, for controllers and running averages."""

    l0: Tensor
    """Scalar: mean active latents per token."""
    min_active: Tensor
    """Scalar: smallest positive latent activation; infinity when nothing fired."""
    step: int


class Sparsity(nn.Module):
    """Base class: a plain ReLU without penalty. Subclasses override what differs."""

    name: ClassVar[str] = ""
    options_class: ClassVar[type[Options]] = Options
    adam_betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    uses_auxk: ClassVar[bool] = False
    """Whether dead latents are revived by the auxiliary loss (see `loss.auxk`)."""
    unitless: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are no lengths: they do not change with the unit of activations."""
    trainable: ClassVar[bool] = True
    """Whether it can be trained here; others are only read from elsewhere and used."""

    def __init__(
        self,
        d_sae: int,
        l0: float | int,
        options: Any = None,
        schedule: Schedule = Schedule(),
    ) -> None:
        super().__init__()
        self.check(d_sae, l0)
        self.d_sae = d_sae
        self.l0 = l0
        self.options = self.options_class() if options is None else options
        self.schedule = schedule
        self.setup()

    def setup(self) -> None:
        """Make parameters, buffers and controllers; called once, at the end of `__init__`."""

    @classmethod
    def check(cls, d_sae: int, l0: float | int) -> None:
        """Refuse a target L0 this architecture cannot meet.

        Raises:
            UserError: with the value and the remedy.
        """
        if l0 < 0 or l0 > d_sae:
            raise UserError(f"target l0 {l0:g} is not between 0 and d_sae = {d_sae}: lower l0 or raise d_sae.")

    @classmethod
    def make_options(cls, given: Mapping[str, Any]) -> Any:
        """The options that are this architecture's own, among those given.

        Raises:
            UserError: a value is of the wrong type or out of range.
        """
        known = {item.name: item for item in dataclasses.fields(cls.options_class)}
        chosen = {name: _as_type(name, value, known[name]) for name, value in given.items() if name in known}
        return cls.options_class(**chosen)

    # From pre-activations to activations

    def activate(self, pre_acts: Tensor, cols: Tensor | slice) -> Tensor:
        """Map pre-activations to latent activations one by one; `cols` looks up per-latent values."""
        return pre_acts.relu()

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """Ask the kernels for the entries that may be non-zero or have a gradient; None takes the dense path."""
        return None

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Latent activations as trained on: the dense truth that the sparse path must equal."""
        return self.activate(pre_acts, slice(None))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Latent activations of a finished SAE; each token stands alone."""
        return self.activate(pre_acts, slice(None))

    def encode(self, sae: "SAE", x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Likewise, from raw activations: for architectures that are no function of the pre-activations."""
        return self.infer_acts(sae.pre_acts(x))

    # What the loss is made of, besides the error of the reconstruction

    def penalty(self, active: Active, step: int) -> Tensor:
        """Scalar added to the loss to drive L0 to its target."""
        return active.latent_acts.new_zeros(())

    def levels(self, active: Active, step: int) -> Levels | None:
        """The stages at which the reconstruction is to be good; None where only the whole one counts."""
        return None

    def gate_acts(self, active: Active) -> Tensor | None:
        """Activations that must reconstruct the input on their own, the decoder held fixed; None where there are none.

        Same shape as `active.latent_acts`. They train a gate whose step function lets no gradient through.
        """
        return None

    def revive(self, dead_pre_acts: Float[Tensor, "batch n_dead"], latents: Int[Tensor, " n_dead"]) -> Tensor | None:
        """Scalar added to the loss for dead latents, which are few; None for none. See also `uses_auxk`."""
        return None

    # Its state

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Set data-dependent state from the pre-activations of the untrained SAE."""

    def update(self, stats: BatchStats) -> None:
        """Move controllers and running averages after an optimiser step."""

    def restart(self) -> None:
        """Forget what was averaged over a run that is over; what was learned stays. Called before training goes on."""

    def rescale(self, factor: float) -> None:
        """Follow a change of units: every pre-activation is now `factor` times what it was."""
        threshold = getattr(self, "threshold", None)
        if threshold is not None:
            with torch.no_grad():
                threshold.mul_(factor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Sparsity":
        # Thresholds stay fp32 whatever the SAE is cast to: bf16 cannot hold the small steps they take, and a
        # rounded threshold moves L0.
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        kept = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in (dict(self.named_parameters()) | dict(self.named_buffers())).items():
            if name in kept and tensor.dtype != kept[name].dtype:
                tensor.data = kept[name].to(tensor.device)
        return self


ARCHITECTURES: dict[str, type[Sparsity]] = {}


def register(cls: type[Sparsity]) -> type[Sparsity]:
    """Make an architecture known by its `name`; usable as a class decorator."""
    if not cls.name:
        raise UserError(f"{cls.__name__} has no name: set the class attribute `name`.")
    ARCHITECTURES[cls.name] = cls
    return cls


def find_architecture(name: str) -> type[Sparsity]:
    """Return the class of an architecture.

    Raises:
        UserError: no such name.
    """
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, sorted(ARCHITECTURES), "Own ones need register() first.")
    return ARCHITECTURES[name]


def trainable_architectures() -> list[str]:
    """Names of those that can be trained here, sorted."""
    return sorted(name for name, cls in ARCHITECTURES.items() if cls.trainable)


def check_options(given: Mapping[str, Any], architectures: list[str]) -> None:
    """Refuse options that none of these architectures has, and bad values.

    Raises:
        UserError: naming the option.
    """
    classes = [find_architecture(name) for name in dict.fromkeys(architectures)]
    known = sorted({item.name for cls in classes for item in dataclasses.fields(cls.options_class)})
    for name in given:
        if name not in known:
            raise unknown(
                f"option of {' or '.join(dict.fromkeys(architectures))}",
                name,
                known,
                "Options are an architecture's own.",
            )
    for cls in classes:
        cls.make_options(given)


def _as_type(name: str, value: Any, item: "dataclasses.Field[Any]") -> Any:
    """The value, if it is of the same kind as the option's default."""
    default = item.default
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"option {name} = {value!r} is not of the kind of its default {default!r}: give it so.")
    return value


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of a list of numbers, as a scalar tensor."""
    if values.is_cuda:  # kthvalue uses a single block per slice there
        return values.topk(n, sorted=False).values.min()
    return values.kthvalue(len(values) - n + 1).values
