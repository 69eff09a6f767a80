"""What published files and their names say besides tensors: metadata files, folder names, arguments.

Nothing here guesses. A key that no reader knows, a value of the wrong kind, or an argument that contradicts a file is
an error, since each of them may be a misspelling of what the maths depend on.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from sae.errors import UserError, unknown
from sae.files import read_json
from sae.formats.interface import Given

Kinds = Mapping[str, type]
NEAR = 0.8  # difflib's ratio; `threshhold`, `d_modle` and `hook_point` for `hook_points` are above, other words are not


def read(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping.

    Raises:
        UserError: it is missing, damaged, or no mapping.
    """
    found = _read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
    if not isinstance(found, dict) or any(not isinstance(key, str) for key in found):
        raise UserError(f"{str(path)!r} is not a mapping of names to values: download it again.")
    return found


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: download it with the weights.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid YAML ({str(error).splitlines()[0]}): download it again.") from None


def check(path: Path, values: Mapping[str, Any], required: Kinds, optional: Kinds, harmless: Collection[str]) -> None:
    """Refuse a metadata file that lacks a key, has one that nobody knows, or a value of the wrong kind.

    Args:
        path: the file, for messages.
        values: what it says.
        required: keys and the kinds of their values.
        optional: likewise; null counts as absent.
        harmless: keys that are known not to change what the SAE computes.

    Raises:
        UserError: naming the key.
    """
    kinds = {**required, **optional}
    for name, value in values.items():
        if name not in kinds and name not in harmless:
            raise unknown(
                f"key in {str(path)!r}",
                name,
                sorted(kinds),
                "It may change what the SAE computes: correct it, or remove it where you know it does not.",
            )
        if name in kinds and not _is(value, kinds[name]) and not (value is None and name in optional):
            raise UserError(f"{name} in {str(path)!r} must be {_WORDS[kinds[name]]}, not {value!r}: correct it.")
    for name in required:
        if name not in values:
            raise UserError(f"{str(path)!r} has no {name!r}: download it again, or add it.")


def check_near(path: Path, values: Mapping[str, Any], kinds: Kinds) -> None:
    """Likewise for a file whose keys are open-ended: what looks like a misspelling of a key that is read is refused.

    Raises:
        UserError: naming the key.
    """
    for name, value in values.items():
        if name in kinds:
            if not _is(value, kinds[name]):
                raise UserError(f"{name} in {str(path)!r} must be {_WORDS[kinds[name]]}, not {value!r}: correct it.")
        elif near := difflib.get_close_matches(name, [key for key in kinds if key not in values], n=1, cutoff=NEAR):
            raise unknown(f"key in {str(path)!r}", name, near, "Correct it, or rename it if it is another thing.")


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping"}


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def only(path: Path, given: Given, *used: str) -> None:
    """Refuse arguments that a format has no use for: they would be dropped in silence.

    Raises:
        UserError: naming the argument.
    """
    for item in dataclasses.fields(given):
        if item.name not in used and getattr(given, item.name) is not None:
            raise UserError(f"{str(path)!r} needs no {item.name}: leave that argument of load out.")


def agreed(path: Path, name: str, found: Any, said: Any) -> Any:
    """What a file says, or the argument where it says nothing; None where neither does.

    Raises:
        UserError: both do, and differ.
    """
    if found is not None and said is not None and found != said:
        raise UserError(f"{str(path)!r} says {name} = {found!r}, not {said!r}: leave {name} out.")
    return said if found is None else found


def part(path: Path, pattern: re.Pattern[str]) -> re.Match[str] | None:
    """The innermost folder or file name on a path that matches as a whole.

    A folder of the hub's cache counts as the repository's name: ``models--owner--name`` as ``name``. Links are not
    followed, since the cache links names to hashes.
    """
    for name in reversed(path.absolute().parts):
        if found := pattern.fullmatch(name.rsplit("--", 1)[-1] if name.startswith("models--") else name):
            return found
    return None


def layer_of(path: Path, pattern: re.Pattern[str], given: Given) -> int:
    """The layer that a file's own name says (group "layer"), else the argument.

    Raises:
        UserError: neither says it, or they differ.
    """
    found = pattern.fullmatch(path.name)
    layer = agreed(path, "layer", int(found["layer"]) if found else None, given.layer)
    return int(given.need("layer", layer, path, "which of its layers to read"))


def about(format: str, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an SAE that was read: where it comes from and what its files said."""
    return {"source": {"format": format, "path": str(path), "said": dict(said)}}


def holds(path: Path, names: re.Pattern[str]) -> bool:
    """Whether a file has such a name, or a folder such a file."""
    files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
    return any(names.fullmatch(file.name) for file in files)
