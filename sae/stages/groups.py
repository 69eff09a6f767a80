"""Which SAEs can be compared with each other: those that differ in nothing but their size and their seed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import Site
from sae.errors import UserError
from sae.lm.model import LanguageModel
from sae.stages.common import check_belongs
from sae.train.controls import TRAINED


class NothingToRelate(UserError):
    """No two SAEs that could be compared."""


@dataclass
class Group:
    """SAEs that differ in nothing but their size and their seed."""

    hook_name: str
    architecture: str
    l0: float
    control: str
    paths: dict[tuple[int, int], Path] = field(default_factory=dict)
    """By d_sae and seed."""

    @property
    def record(self) -> dict[str, Any]:
        """What names it in the result."""
        return {
            "hook_name": self.hook_name,
            "architecture": self.architecture,
            "l0_target": self.l0,
            "control": self.control or "none",
        }

    @property
    def file(self) -> str:
        """The beginning of its files' names."""
        control = f"-{self.control}" if self.control else ""
        return f"{Site.parse(self.hook_name).folder}-{self.architecture}-l0_{self.l0:g}{control}"

    def sizes(self) -> dict[int, list[int]]:
        """The sizes of each seed, narrowest first."""
        seeds = sorted({seed for _, seed in self.paths})
        return {seed: sorted(size for size, other in self.paths if other == seed) for seed in seeds}

    def seeds(self) -> dict[int, list[int]]:
        """The seeds of each size."""
        sizes = sorted({size for size, _ in self.paths})
        return {size: sorted(seed for other, seed in self.paths if other == size) for size in sizes}

    def is_related(self) -> bool:
        """Whether there is anything to compare."""
        return any(len(found) > 1 for found in (*self.sizes().values(), *self.seeds().values()))


def find_groups(lm: LanguageModel, paths: list[Path], *, force: bool) -> list[Group]:
    """Sort SAEs into groups of one site, architecture, L0 and control, hook point after hook point.

    Args:
        lm: whose they should be.
        paths: their folders.
        force: also take SAEs of another model of the same width.

    Raises:
        NothingToRelate: no group with two.
        UserError: one that does not belong, or two of the same size and seed in a group.
    """
    groups: dict[tuple[str, str, float, str], Group] = {}
    for path in paths:
        sae = SAE.load(path)
        check_belongs(lm, sae, path, force=force)
        config = sae.config
        control = str(config.metadata.get("training", {}).get("control", TRAINED))
        key = (config.hook_name, config.architecture, float(config.l0), control)
        found = groups.setdefault(key, Group(*key))
        other = found.paths.setdefault((config.d_sae, config.seed), path)
        if other != path:
            raise UserError(
                f"{str(other)!r} and {str(path)!r} have the same size and seed ({config.d_sae}, {config.seed}) at "
                f"{config.hook_name!r}: leave one of them out of eval.saes."
            )
    if not any(group.is_related() for group in groups.values()):
        raise NothingToRelate(
            f"no two of the {len(paths)} SAEs share hook point, architecture and L0: name several sizes or seeds of "
            "one, eval.saes=[folder,folder]."
        )
    return sorted(groups.values(), key=lambda group: group.hook_name)
