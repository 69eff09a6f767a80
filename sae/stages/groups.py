"""Which SAEs can be compared with each other: those that differ in nothing but their size and their seed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.autoencoder.sae import SAEConfig
from sae.errors import UserError
from sae.train.controls import NO_CONTROL, control_of


class NothingToRelate(UserError):
    """No two SAEs that could be compared."""


@dataclass
class Group:
    """SAEs that differ in nothing but their size and their seed."""

    hook_name: str
    architecture: str
    l0: float
    control: str
    """`NO_CONTROL`, or the control they are."""
    skip: bool
    options: dict[str, Any]
    """Of the architecture, where they differ from its defaults."""
    paths: dict[tuple[int, int], Path] = field(default_factory=dict)
    """By d_sae and seed."""

    @property
    def record(self) -> dict[str, Any]:
        """What names it in the result."""
        return {
            "hook_name": self.hook_name,
            "architecture": self.architecture,
            "l0_target": self.l0,
            "control": self.control,
            "skip": self.skip,
            "options": self.options,
        }

    @property
    def title(self) -> str:
        """What names it to a reader."""
        parts = [self.hook_name, self.architecture, f"L0 {self.l0:g}"]
        parts += [f"control {self.control}"] if self.control != NO_CONTROL else []
        options = in_words(self.skip, self.options)
        return ", ".join([*parts, options] if options else parts)

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


def in_words(skip: bool, options: Mapping[str, Any]) -> str:
    """A group's options as a table has them; empty where there are none."""
    return ", ".join([*(["skip"] if skip else []), *(f"{name}={value}" for name, value in options.items())])


def find_groups(configs: Mapping[Path, SAEConfig]) -> list[Group]:
    """Sort SAEs into groups of one site, architecture, L0, control and options, hook point after hook point.

    Args:
        configs: what they are, by their folders.

    Raises:
        NothingToRelate: no group with two.
        UserError: two of the same size and seed in a group.
    """
    groups: dict[str, Group] = {}
    for path, config in configs.items():
        control = control_of(config) or NO_CONTROL
        group = Group(
            config.hook_name, config.architecture, float(config.l0), control, config.skip, dict(config.options)
        )
        found = groups.setdefault(json.dumps(group.record, sort_keys=True), group)
        other = found.paths.setdefault((config.d_sae, config.seed), path)
        if other != path:
            raise UserError(
                f"{str(other)!r} and {str(path)!r} have the same size and seed ({config.d_sae}, {config.seed}) at "
                f"{config.hook_name!r}: leave one of them out of eval.saes."
            )
    if not any(group.is_related() for group in groups.values()):
        raise NothingToRelate(
            f"no two of the {len(configs)} SAEs share hook point, architecture, L0 and options: name several sizes or "
            "seeds of one, eval.saes=[folder,folder]."
        )
    return sorted(groups.values(), key=lambda group: group.hook_name)
