"""Python modules or files of the user's, imported before anything runs: architectures of their own register themselves.

sae train name=mine plugins=[soft.py] sae.architecture=[soft]
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from sae.errors import UserError


def load(names: Sequence[str]) -> dict[str, str]:
    """Import each once. Return the SHA-256 of each one's source, by name: other code makes another run.

    Args:
        names: dotted module names, or paths that end in ``.py``.

    Raises:
        UserError: one is not there, or fails while it is imported.
    """
    return {name: _load(name) for name in names}


def _load(name: str) -> str:
    try:
        if not name.endswith(".py"):
            module = importlib.import_module(name)
            source = Path(str(module.__file__)).read_bytes() if getattr(module, "__file__", None) else b""
            return hashlib.sha256(source).hexdigest()
        path = Path(name).resolve()
        source = path.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        key = f"{path.stem}_{digest[:8]}"  # the same file is imported once in a process, however it is named
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, path)
            assert spec is not None and spec.loader is not None  # noqa: PT018 - a path that ends in .py has both
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[key]
                raise
        return digest
    except Exception as error:
        raise UserError(
            f"plugins: {name!r} cannot be imported ({type(error).__name__}: {error}): give a module's name or the path "
            "of a Python file."
        ) from error
