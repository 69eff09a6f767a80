"""Which judge it was: a hash that changes when the judge does, so that results of one are not taken for another's.

A judge that has an attribute `fingerprint` (a text) says itself what its verdicts rest on: fitted judges give their
weights, endpoint judges the address, model and instruction. Of any other function it is the source file, what it
closes over, its defaults, and, in the same way, the functions, values and modules that it names; of an object, its
class and its fields. What lies in the standard library or in installed packages counts by name only. So a judge that
rests on something else, such as a local model or a file that it reads at every call, should have a `fingerprint`.
"""

import enum
import functools
import hashlib
import inspect
import json
import marshal
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sae.behavior.judge import Judge
from sae.files import sha256_file, sha256_json

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
_OWN = __name__.partition(".")[0]


class _Trail(NamedTuple):
    """Where a description has come from: what it is inside of, and which functions were described already."""

    above: tuple[int, ...]
    told: set[int]


def judge_key(judge: Judge) -> str:
    """Return the SHA-256 of what a judge's verdicts rest on; see the head of this module."""
    return sha256_json(_described(judge, _Trail((), set())))


def _described(value: Any, trail: _Trail) -> Any:
    """Return JSON that is the same in every process, and another for another judge."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in trail.above:
        return "itself"
    trail = trail._replace(above=(*trail.above, id(value)))
    data = _data(value, trail)
    return _code(value, trail) if data is None else data


def _data(value: Any, trail: _Trail) -> list[Any] | None:
    """Describe containers and values; None for anything else."""
    if isinstance(value, enum.Enum):
        return [_named(type(value)), value.name]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, re.Pattern):
        return ["pattern", _described(value.pattern, trail), value.flags]
    if isinstance(value, Tensor):
        # Through float64, since numpy knows no bfloat16; every smaller number survives it.
        return [str(value.dtype), *_array(value.detach().cpu().double().numpy())]
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value))
    if isinstance(value, Mapping):
        pairs = [[_described(key, trail), _described(item, trail)] for key, item in value.items()]
        return [_named(type(value)), sorted(pairs, key=json.dumps)]
    if isinstance(value, set | frozenset):
        return [_named(type(value)), sorted((_described(item, trail) for item in value), key=json.dumps)]
    if isinstance(value, list | tuple):
        return [_named(type(value)), [_described(item, trail) for item in value]]
    return None


def _array(value: np.ndarray) -> list[Any]:
    if value.dtype == object:
        return ["array", repr(value.tolist())]
    return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]


def _code(value: Any, trail: _Trail) -> list[Any]:
    """Describe functions, classes and objects."""
    if isinstance(value, functools.partial):
        return ["partial", *(_described(item, trail) for item in (value.func, value.args, value.keywords))]
    if isinstance(value, MethodType):
        return ["method", _described(value.__func__, trail), _described(value.__self__, trail)]
    if isinstance(value, FunctionType):
        return _function(value, trail)
    if isinstance(value, type):
        return [_named(value), _source(value)]
    if isinstance(value, ModuleType):
        return [value.__name__, _source(value)]
    if isinstance(value, BuiltinFunctionType):
        return [value.__qualname__]
    about = [_named(type(value)), _source(type(value))]
    told = getattr(value, "fingerprint", None)
    if isinstance(told, str):
        return [*about, told]
    wrapped = getattr(value, "__wrapped__", None)  # functools.cache and the like
    if isinstance(wrapped, FunctionType):
        return [*about, _described(wrapped, trail)]
    if _is_installed(type(value)):
        return about
    call = getattr(type(value), "__call__", None)  # noqa: B004 - the function, not whether there is one
    return [
        *about,
        _function(call, trail) if isinstance(call, FunctionType) else None,
        _described(getattr(value, "__dict__", {}), trail),
    ]


def _function(value: FunctionType, trail: _Trail) -> list[Any]:
    about = [f"{value.__module__}.{value.__qualname__}"]
    if _is_installed(value) or id(value) in trail.told:
        return about
    trail.told.add(id(value))
    cells = [_described(cell.cell_contents, trail) for cell in value.__closure__ or () if _is_filled(cell)]
    used = {name: value.__globals__[name] for name in sorted(_names(value.__code__)) if name in value.__globals__}
    named = [[name, _described(item, trail)] for name, item in used.items()]
    defaults = _described([value.__defaults__, value.__kwdefaults__], trail)
    return [*about, _source(value), cells, defaults, named]


def _names(code: CodeType) -> set[str]:
    """The names that a function and those inside it look up."""
    inner = [_names(item) for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*inner)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - asking is how one finds out
    except ValueError:
        return False
    return True


def _named(value: type) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _file(value: Any) -> Path | None:
    try:
        found = inspect.getsourcefile(value)
    except TypeError:  # built in
        return None
    return None if found is None or not Path(found).is_file() else Path(found).resolve()


def _is_installed(value: Any) -> bool:
    """Whether it is of the standard library or an installed package, this one aside."""
    module = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
    if module.partition(".")[0] == _OWN:
        return False
    if module == "builtins":
        return True
    file = _file(value)
    return file is not None and any(file.is_relative_to(folder) for folder in _INSTALLED)


def _source(value: Any) -> str:
    """The hash of the file that something is written in; of its code where there is no file."""
    if _is_installed(value):
        return ""
    file = _file(value)
    if file is not None:
        return sha256_file(file)
    return hashlib.sha256(marshal.dumps(value.__code__, 2)).hexdigest() if isinstance(value, FunctionType) else ""
