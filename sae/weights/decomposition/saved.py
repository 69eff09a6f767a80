"""A decomposition on disk: a folder of JSON and safetensors, replaced as a whole.

`decomposition.json` says how it was made, of which matrices, how far it is and how the losses went;
`components.safetensors` has every matrix's components and gate; `training.safetensors`, there until it is finished,
the optimiser's moments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import UserError
from sae.files import (
    SCHEMA_VERSION,
    atomic_folder,
    check_replaceable,
    read_json,
    read_tensors,
    to_plain,
    write_json,
    write_tensors,
)
from sae.lm.matrices import Matrix
from sae.weights.decomposition.components import Decomposition
from sae.weights.decomposition.settings import DecompositionSettings

RECORD, COMPONENTS, TRAINING = "decomposition.json", "components.safetensors", "training.safetensors"


class Start(NamedTuple):
    """Where training goes on."""

    step: int
    history: list[dict[str, float]]


def _named(decomposition: Decomposition) -> dict[str, Tensor]:
    return {f"{one.name}/{key}": value for one in decomposition for key, value in one.state_dict().items()}


def save(
    folder: Path | str,
    decomposition: Decomposition,
    matrices: Sequence[Matrix],
    step: int,
    history: Sequence[dict[str, float]],
    optimiser: torch.optim.Optimizer | None = None,
) -> None:
    """Write a decomposition after some steps; with its optimiser, if it is not finished.

    Raises:
        UserError: the folder holds something else.
    """
    check_replaceable(folder, RECORD, "parameter decomposition")
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / COMPONENTS, _named(decomposition))
        if optimiser is not None:
            states = optimiser.state_dict()["state"]
            moments = {f"{index}/{key}": value for index, own in states.items() for key, value in own.items()}
            write_tensors(temporary / TRAINING, moments)
        record = {
            "schema_version": SCHEMA_VERSION,
            "settings": decomposition.settings,
            "fingerprint": decomposition.fingerprint,
            "matrices": {matrix.name: list(matrix.parameter.shape) for matrix in matrices},
            "step": step,
            "finished": step >= decomposition.settings.steps,
            "rows_run": decomposition.rows_run,
            "history": history,
        }
        write_json(temporary / RECORD, record)


def _record(folder: Path | str) -> dict[str, Any]:
    record = read_json(Path(folder) / RECORD)
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or "settings" not in record:
        raise UserError(f"{str(folder)!r} is no parameter decomposition of this version: make it anew.")
    return record


def _fill(folder: Path | str, record: dict[str, Any], decomposition: Decomposition) -> None:
    tensors = read_tensors(Path(folder) / COMPONENTS)
    own = _named(decomposition)
    if tensors.keys() != own.keys() or any(tensors[key].shape != own[key].shape for key in own):
        raise UserError(f"{str(Path(folder) / COMPONENTS)!r} does not fit {RECORD} beside it: make it anew.")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[key])
    decomposition.rows_run = float(record["rows_run"])


def resume(folder: Path | str, decomposition: Decomposition, optimiser: torch.optim.Optimizer) -> Start | None:
    """Fill a fresh decomposition and its optimiser from a folder; None where there is nothing.

    Raises:
        UserError: what is there was made with other settings, or of another model.
    """
    if not (Path(folder) / RECORD).is_file():
        check_replaceable(folder, RECORD, "parameter decomposition")
        return None
    record = _record(folder)
    same = record["settings"] == to_plain(decomposition.settings)
    if not same or record["fingerprint"] != decomposition.fingerprint:
        raise UserError(f"{str(folder)!r} was made with other settings or of another model: name another folder.")
    _fill(folder, record, decomposition)
    if not record["finished"]:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in read_tensors(Path(folder) / TRAINING).items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return Start(int(record["step"]), list(record["history"]))


def open_decomposition(folder: Path | str, matrices: Sequence[Matrix], fingerprint: str = "") -> Decomposition:
    """Open a decomposition of these matrices.

    Args:
        folder: where it was saved.
        matrices: of the model it is of.
        fingerprint: of that model; "" does not check.

    Raises:
        UserError: nothing there, not finished, damaged, or of another model.
    """
    record = _record(folder)
    if not record["finished"]:
        raise UserError(f"the decomposition in {str(folder)!r} is not finished: train it to its end first.")
    shapes = {matrix.name: list(matrix.parameter.shape) for matrix in matrices}
    if record["matrices"] != shapes or (fingerprint and record["fingerprint"] != fingerprint):
        raise UserError(f"{str(folder)!r} is a decomposition of another model: name one of this model.")
    try:
        settings = DecompositionSettings(**record["settings"])
    except TypeError:
        raise UserError(f"{str(Path(folder) / RECORD)!r} has other settings than this version: make it anew.") from None
    found = Decomposition(matrices, settings, record["fingerprint"]).to(matrices[0].parameter.device)
    _fill(folder, record, found)
    return found.eval().requires_grad_(False)
