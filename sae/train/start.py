"""Going on from trained SAEs: where they lie, whether they fit, and how their weights are taken over."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sae.autoencoder.sae import CONFIG_FILE, SAE, WEIGHTS_FILE, SAEConfig
from sae.errors import UserError
from sae.files import sha256_file
from sae.train.controls import TRAINED
from sae.train.grid import SAESpec


def start_folder(start: str, spec: SAESpec) -> Path | None:
    """Where the SAE lies that this one starts from: `start` itself, or its place in a run; None without a start."""
    if not start:
        return None
    folder = Path(start)
    return folder if (folder / CONFIG_FILE).is_file() else folder / spec.folder


def start_hash(start: str, spec: SAESpec) -> str:
    """Content hash of the weights an SAE starts from; empty where there are none, or where they are gone."""
    folder = start_folder(start, spec)
    return sha256_file(folder / WEIGHTS_FILE) if folder is not None and (folder / WEIGHTS_FILE).is_file() else ""


def check_starts(start: str, specs: Sequence[SAESpec], widths: Mapping[str, int]) -> None:
    """Refuse SAEs to start from that are not there, are spoilt, or are unlike those to train. Writes nothing.

    Args:
        start: as in `TrainSettings.start`.
        specs: the SAEs to train.
        widths: of the activations at their hook points, by name.

    Raises:
        UserError: naming the file, or what differs; or a control, which is to keep what was drawn.
    """
    found: dict[Path, SAEConfig] = {}
    for spec in specs:
        folder = start_folder(start, spec)
        if folder is not None:
            _check_no_control(start, spec)
            if folder not in found:
                found[folder] = SAE.load(folder).config
            check_alike(spec.config(widths, {}), found[folder])


def _check_no_control(start: str, spec: SAESpec) -> None:
    """A control is about what a random dictionary reaches, so it must not begin with a trained one."""
    if spec.control != TRAINED:
        raise UserError(
            f"the control {spec.control!r} keeps weights as they were drawn at random, but train.start={start!r} would "
            "replace them by trained ones: leave out sae.control, or train the controls in a run without train.start."
        )


def check_alike(ours: SAEConfig, theirs: SAEConfig) -> None:
    """Refuse to start one SAE from another of a different make.

    Raises:
        UserError: naming what differs.
    """
    for name in ("architecture", "d_in", "d_sae", "width_out", "skip", "normalize"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"the SAE to start from has {name} = {getattr(theirs, name)!r}, but the one to train has "
                f"{getattr(ours, name)!r}: make them equal."
            )
    if ours.site.kind != theirs.site.kind:
        raise UserError(f"the SAE to start from is a {theirs.site.kind}, not a {ours.site.kind}: start from another.")
    if ours.read_widths != theirs.read_widths:
        raise UserError(
            f"the SAE to start from reads hook points {theirs.read_widths} wide, but the one to train reads "
            f"{ours.read_widths}: start from another."
        )


@torch.no_grad()
def go_on_from(sae: SAE, trained: SAE, scales: Mapping[str, float]) -> None:
    """Give a fresh SAE the weights of a trained one, in its own normalised units.

    Args:
        sae: the SAE that will be trained.
        trained: what it starts from; changed in place.
        scales: what the activations of each hook point are multiplied by in the training to come.

    Raises:
        UserError: the two are not alike.
    """
    check_alike(sae.config, trained.config)
    site = sae.config.site
    # Folding in the reciprocal of a scale takes the scale out.
    reads, writes = ([1 / scales[name] for name in names] for names in (site.reads, site.writes))
    trained.fold_scales(reads, writes)
    sae.load_state_dict(trained.state_dict())
    sae.sparsity.restart()
