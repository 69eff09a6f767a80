"""Read what crosscoders say of two language models, as `sae eval suite=diff` wrote it."""

from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.files import read_tensors
from sae.report.model import Comparison, CrossedRow, Exclusive, LoneLatent
from sae.report.values import as_control, as_dict, as_float, as_int, as_list, as_text

N_BINS = 40
"""Of the histogram of relative norms."""


def read_comparison(folder: Path, result: dict[str, Any], problems: list[str]) -> Comparison:
    """Read the result and, where they lie beside it, the figures of every latent.

    Args:
        folder: where the result is.
        result: its content; what is missing or malformed is left out.
        problems: gets a sentence for a file that is there and cannot be read.
    """
    thresholds = {name: as_float(value) for name, value in as_dict(result.get("thresholds")).items()}
    return Comparison(
        first=as_text(result.get("first")),
        pair=as_text(result.get("pair")),
        thresholds={name: value for name, value in thresholds.items() if value is not None},
        crosscoders=[_crossed(folder, as_dict(entry), problems) for entry in as_list(result.get("crosscoders"))],
    )


def _crossed(folder: Path, entry: dict[str, Any], problems: list[str]) -> CrossedRow:
    values: dict[str, Any] = {name: as_text(entry.get(name)) for name in ("hook_name", "architecture", "path")}
    counts = ("d_sae", "seed", "n_tokens", "shared", "between", "rare")
    values |= {name: as_int(entry.get(name)) for name in counts}
    return CrossedRow(
        **values,
        l0_target=as_float(entry.get("l0_target")),
        control=as_control(entry.get("control")),
        first_only=_exclusive(entry.get("first_only")),
        pair_only=_exclusive(entry.get("pair_only")),
        first_latents=_latents(entry.get("first_latents")),
        pair_latents=_latents(entry.get("pair_latents")),
        norm_counts=_norm_counts(folder, as_text(entry.get("tensors")), problems),
    )


def _exclusive(value: Any) -> Exclusive:
    entry = as_dict(value)
    return Exclusive(*(as_int(entry.get(name)) for name in ("by_norm", "shrunk", "decoupled", "confirmed")))


def _latents(value: Any) -> list[LoneLatent]:
    found = []
    for entry in map(as_dict, as_list(value)):
        latent = as_int(entry.get("latent"))
        if latent is not None:
            numbers = {name: as_float(entry.get(name)) for name in ("relative_norm", "nu_error", "nu_reconstruction")}
            n_fired, verdict = as_int(entry.get("n_fired")), as_text(entry.get("verdict"))
            found.append(LoneLatent(latent, **numbers, n_fired=n_fired, verdict=verdict))
    return found


def _norm_counts(folder: Path, name: str, problems: list[str]) -> list[int]:
    """How many judged latents have which relative norm; empty where their file is not there."""
    path = folder / name
    try:
        # A result that was tampered with must not have other files read.
        if not name or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return []
        tensors = read_tensors(path)
    except (UserError, OSError, ValueError) as error:
        problems.append(str(error))
        return []
    norms = tensors.get("relative_norm")
    if norms is None:
        return []
    rare = tensors.get("is_rare")
    judged = norms[~rare.bool()] if rare is not None and rare.shape == norms.shape else norms
    # A row of zeros has no relative norm; where two norms are equal, half lies in the middle of a bin.
    kept = judged.float()[judged.isfinite()]
    places = (kept * (N_BINS + 1)).long().clamp(0, N_BINS)
    return [int(count) for count in places.bincount(minlength=N_BINS + 1)]
