"""Whether a result on SAEs is about those that are there: a run may be trained anew after a suite has measured it."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sae.files import sha256_file
from sae.report.values import as_dict, as_list, as_text

CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.safetensors"
GIVEN = "eval/given"


def objection(
    run: Path, stage: str, manifest: Mapping[str, Any], train: Mapping[str, Any], hashes: dict[Path, str]
) -> str | None:
    """Say why a result of `sae eval` is not to be shown; None where nothing speaks against it.

    Args:
        run: the run's folder, maybe moved since.
        stage: `eval`, or a suite of it.
        manifest: the stage's manifest; empty where there is none.
        train: result of the run's training; empty where there is none.
        hashes: of files read before; those that are read are added.
    """
    if not manifest:
        return f"{stage}/result.json is left out, since it was not finished: run the same `sae eval` again."
    for name, noted in as_dict(manifest.get("inputs")).items():
        if noted and _is_other(run, stage, PurePath(name), str(noted), train, hashes):
            return (
                f"{stage}/result.json is left out, since {name!r} is not, or no longer, the SAE that it is about: run "
                "the same `sae eval` again."
            )
    return None


def _is_other(
    run: Path, stage: str, name: PurePath, noted: str, train: Mapping[str, Any], hashes: dict[Path, str]
) -> bool:
    """Whether an input is an SAE that is not what it was; one that was only deleted may still be shown."""
    own = None if stage.startswith(GIVEN) else _in_training(name)
    place = Path(name) if own is None else run / "train" / own
    file = place if place.name == CONFIG_FILE else place / WEIGHTS_FILE
    if file.is_file():
        if file not in hashes:
            hashes[file] = sha256_file(file)
        return hashes[file] != noted
    trained = {_in_training(PurePath(as_text(as_dict(row).get("path")))) for row in as_list(train.get("saes"))}
    folder = own.parent if own is not None and own.name == CONFIG_FILE else own
    return folder is not None and bool(trained) and folder not in trained


def _in_training(name: PurePath) -> PurePath | None:
    """What a path says after the last `train`: an SAE's place in a run, wherever the run lies."""
    parts = name.parts
    if "train" not in parts[:-1]:
        return None
    return PurePath(*parts[len(parts) - parts[::-1].index("train") :])
