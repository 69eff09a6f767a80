"""The grid of SAEs one run trains from one stream: hook points x widths x architectures x targets x seeds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from sae.autoencoder.sparsity import find_architecture
from sae.errors import UserError


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train.

    Raises:
        UserError: a value is out of range, or the architecture is unknown.
    """

    hook_name: str
    architecture: str
    d_sae: int
    l0: float | int
    """Target mean number of active latents per token."""
    seed: int

    def __post_init__(self) -> None:
        if not self.hook_name or "/" in self.hook_name or "\\" in self.hook_name or self.hook_name.startswith("."):
            raise UserError(f"hook name {self.hook_name!r} cannot name a folder: use a TransformerLens hook name.")
        object.__setattr__(self, "l0", float(self.l0))  # 4 and 4.0 are one spec, in hashes too
        if self.d_sae < 1:
            raise UserError(f"d_sae = {self.d_sae} is less than 1: give each SAE at least one latent.")
        if not self.l0 > 0:
            raise UserError(f"target l0 = {self.l0:g} is not above 0: say how many latents should fire per token.")
        find_architecture(self.architecture).check(self.d_sae, self.l0)

    @property
    def folder(self) -> str:
        """Where the SAE is saved, relative to the run: `<hook_name>/<architecture>-<d_sae>-l0_<l0>-s<seed>`."""
        l0 = str(int(self.l0)) if self.l0 == int(self.l0) else repr(self.l0)
        return f"{self.hook_name}/{self.architecture}-{self.d_sae}-l0_{l0}-s{self.seed}"


def grid(
    hook_names: Iterable[str],
    d_sae: Iterable[int],
    architectures: Iterable[str],
    l0: Iterable[float | int],
    seeds: Iterable[int],
) -> list[SAESpec]:
    """Every combination, in the order given, hook points outermost.

    Raises:
        UserError: an axis is empty, a combination occurs twice, or a value is out of range.
    """
    axes = (list(hook_names), list(architectures), list(d_sae), list(l0), list(seeds))
    for name, values in zip(("hook_names", "architectures", "d_sae", "l0", "seeds"), axes, strict=True):
        if not values:
            raise UserError(f"the SAE grid has no {name}: give at least one.")
    specs = [SAESpec(*values) for values in product(*axes)]
    check_specs(specs)
    return specs


def check_specs(specs: list[SAESpec]) -> None:
    """Refuse an empty list and duplicates.

    Raises:
        UserError: naming the duplicate.
    """
    if not specs:
        raise UserError("there is no SAE to train: give at least one spec.")
    folder, times = Counter(spec.folder for spec in specs).most_common(1)[0]
    if times > 1:
        raise UserError(f"the SAE grid lists {folder!r} {times} times: remove the duplicates.")
