"""The grid of SAEs one run trains from one stream: sites x widths x architectures x targets x seeds x controls."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from sae.autoencoder.sae import SAEConfig
from sae.autoencoder.site import Site
from sae.autoencoder.sparsity import find_architecture, trainable_architectures
from sae.errors import UserError, unknown
from sae.train.controls import FROZEN, TRAINED


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train.

    Raises:
        UserError: a value is out of range, or the architecture is unknown.
    """

    hook_name: str
    """A hook point; or the site of a transcoder or crosscoder (see `sae.autoencoder.site`)."""
    architecture: str
    d_sae: int
    l0: float | int
    """Target mean number of active latents per token."""
    seed: int
    control: str = TRAINED
    """What must not be learned; see `sae.train.controls`."""
    skip: bool = False
    """A transcoder with a linear path beside the latents."""

    def __post_init__(self) -> None:
        if not self.hook_name or "/" in self.hook_name or "\\" in self.hook_name or self.hook_name.startswith("."):
            raise UserError(f"hook name {self.hook_name!r} cannot name a folder: use a TransformerLens hook name.")
        object.__setattr__(self, "l0", float(self.l0))  # 4 and 4.0 are one spec, in hashes too
        if self.d_sae < 1:
            raise UserError(f"d_sae = {self.d_sae} is less than 1: give each SAE at least one latent.")
        if not self.l0 > 0:
            raise UserError(f"target l0 = {self.l0:g} is not above 0: say how many latents should fire per token.")
        architecture = find_architecture(self.architecture)
        if not architecture.trainable:
            raise UserError(
                f"{self.architecture!r} is for SAEs that were trained elsewhere: train one of "
                f"{', '.join(trainable_architectures())}."
            )
        architecture.check(self.d_sae, self.l0)
        kind = self.site.kind
        if self.control not in FROZEN:
            raise unknown("control", self.control, [name for name in FROZEN if name])
        if self.skip and kind != "transcoder":
            raise UserError(f"{self.hook_name!r} is no transcoder's site, so it can have no skip: leave sae.skip out.")

    @property
    def site(self) -> Site:
        """The hook points it reads and writes."""
        return Site.parse(self.hook_name)

    @property
    def folder(self) -> str:
        """Where the SAE is saved, relative to the run: `<site>/<architecture>-<d_sae>-l0_<l0>-s<seed>[-<more>]`."""
        l0 = str(int(self.l0)) if self.l0 == int(self.l0) else repr(self.l0)
        more = ("-skip" if self.skip else "") + (f"-{self.control}" if self.control else "")
        return f"{self.site.folder}/{self.architecture}-{self.d_sae}-l0_{l0}-s{self.seed}{more}"

    def config(
        self,
        widths: Mapping[str, int],
        options: Mapping[str, Any],
        lm_name: str = "",
        lm_fingerprint: str = "",
    ) -> SAEConfig:
        """What the SAE will be.

        Args:
            widths: of the activations at its hook points, by name.
            options: of the architectures of the grid; it takes those that are its own.
            lm_name: the language model whose activations they are.
            lm_fingerprint: content hash of that model's weights.
        """
        site = self.site
        d_in, d_out = (sum(widths[name] for name in names) for names in (site.reads, site.writes))
        known = {item.name for item in fields(find_architecture(self.architecture).options_class)}
        return SAEConfig(
            architecture=self.architecture,
            d_in=d_in,
            d_sae=self.d_sae,
            l0=self.l0,
            seed=self.seed,
            hook_name=self.hook_name,
            lm_name=lm_name,
            lm_fingerprint=lm_fingerprint,
            d_out=d_out if site.kind == "transcoder" else 0,
            source_widths=[widths[name] for name in site.reads] if site.kind == "crosscoder" else [],
            skip=self.skip,
            # As JSON has them: a list comes back as a list.
            options={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in options.items()
                if name in known
            },
        )


def grid(
    hook_names: Iterable[str],
    d_sae: Iterable[int],
    architectures: Iterable[str],
    l0: Iterable[float | int],
    seeds: Iterable[int],
    controls: Iterable[str] = (TRAINED,),
    skip: bool = False,
) -> list[SAESpec]:
    """Every combination, in the order given, sites outermost.

    Raises:
        UserError: an axis is empty, a combination occurs twice, or a value is out of range.
    """
    axes = (list(hook_names), list(architectures), list(d_sae), list(l0), list(seeds), list(controls))
    for name, values in zip(("hook_names", "architectures", "d_sae", "l0", "seeds", "controls"), axes, strict=True):
        if not values:
            raise UserError(f"the SAE grid has no {name}: give at least one.")
    specs = [SAESpec(*values, skip=skip) for values in product(*axes)]
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
