"""What a format is: how its folders are told, read and written."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from sae.autoencoder.sae import SAE
from sae.errors import UserError, unknown


@dataclass(frozen=True)
class Given:
    """What the caller says because the files do not. None: not said.

    A reader takes these before what files say only where files cannot know better; where neither says it, it is an
    error that names the argument.
    """

    hook_name: str | None = None
    """Hook point (or site) as TransformerLens names it."""
    lm_name: str | None = None
    """The language model."""
    k: int | None = None
    """Latents active on a token, of TopK files that do not say."""
    layer: int | None = None
    """Of files with several layers."""
    scale: float | None = None
    """What activations were multiplied by in training, of files whose weights are for scaled ones."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Given":
        """Check names.

        Raises:
            UserError: a name that no reader knows.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise unknown("argument of load", name, known)
        return cls(**options)

    def need(self, name: str, found: Any, where: Path | str, why: str) -> Any:
        """What the caller gave, else what the files say.

        Raises:
            UserError: neither does; `why` says what it is needed for.
        """
        said = getattr(self, name)
        value = found if said is None else said
        if value is None or value == "":
            raise UserError(f"{str(where)!r} does not say {name}, {why}: give it, sae.load(..., {name}=...).")
        return value


class Format(NamedTuple):
    """One format."""

    name: str
    """As `sae convert format=...` and `sae.load(format=...)` name it."""
    title: str
    """Library and what of it, for people."""
    matches: Callable[[Path], bool]
    """Whether a folder (or file) is of this format, told by the names and headers of its files alone."""
    read: Callable[[Path, Given], SAE]
    """Read it. Raises UserError, with a remedy, for what is missing, misspelt, damaged or not supported."""
    write: Callable[[SAE, Path], None] | None = None
    """Write it, completely or not at all; None where there is no writer. Raises UserError for what it cannot hold."""
