"""`sae wiring name=<run>`: which heads, neurons and singular directions write and read a behaviour's latents.

Takes the SAE and latents that `sae behavior` found in this run, or `wiring.sae` and `wiring.latents`, and prompts of
the report split. If `sae localize` was run on heads or neurons, what it located, knowing nothing of latents, is set
beside them; on the organism, so is what was planted. Writes `wiring/result.json`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae.autoencoder.sae import SAE, read_config
from sae.behavior.contrast import ContrastSet
from sae.behavior.measure import prepare
from sae.config import RunConfig
from sae.errors import UserError
from sae.files import read_json, read_tensors, sha256_json, to_plain, write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.organism.truth import Truth
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import open_contrasts
from sae.stages.opened import opened_saes
from sae.weights.circuits.members import truth_of
from sae.weights.wiring import Side, Wiring, beside_located, wire

LEVELS = ("head", "neuron")


class Subject(NamedTuple):
    """The latents of one behaviour."""

    path: Path
    latents: list[int]


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "wiring")
    clock = common.Clock()
    lm = common.open_lm(config.lm)
    contrasts = {name: item.contrast for name, item in open_contrasts(config, lm).items()}
    subjects = _subjects(config, lm, list(contrasts))
    folder = config.folder / "wiring"
    inputs = {"lm": common.model_key(lm)} | {name: sha256_json(contrasts[name].records) for name in subjects}
    inputs |= common.sae_inputs([one.path for one in subjects.values()], folder)
    located = {name: _located(config.folder / "localize" / name) for name in subjects}
    inputs |= {f"located {name}": sha256_json(found) for name, found in located.items()}
    noted = to_plain(config.wiring) | {"subjects": to_plain(subjects)}
    if common.skip(config, folder, noted, inputs):
        return
    found = []
    with Progress(sum(len(one.latents) for one in subjects.values()), "wiring", unit="latent") as bar:
        for name, subject in subjects.items():
            encoder = SAE.load(subject.path, device=lm.device)
            for latent in subject.latents:
                wiring = _wire(config, lm, encoder, latent, contrasts[name])
                found.append(_record(name, subject.path, encoder, wiring, located[name], truth_of(lm, name), config))
                bar.update(1, now=f"{name} {latent}")
    result = {"schema_version": 1, "latents": found, "settings": noted, "wall_s": clock.seconds()}
    write_json(folder / "result.json", result)
    write_manifest(folder, "wiring", noted, inputs)
    for record in found:
        _print(record)
    print(f"{folder / 'result.json'}: {len(found)} latents in {clock.seconds():.1f} s")


def _subjects(config: RunConfig, lm: LanguageModel, names: Sequence[str]) -> dict[str, Subject]:
    """Whose parts are asked for, by behaviour."""
    options = config.wiring
    if options.sae:
        if len(names) != 1:
            raise UserError(f"wiring.sae is read on one behaviour's prompts, not {list(names)}: say contrast=... .")
        (path,) = opened_saes(config, [options.sae])
        chosen = {names[0]: Subject(path, list(options.latents))}
    else:
        file = config.folder / "behavior" / "result.json"
        behaviors = read_json(file)["behaviors"] if file.is_file() else {}
        chosen = {
            name: Subject(Path(behaviors[name]["path"]), list(behaviors[name]["latents"]))
            for name in names
            if behaviors.get(name, {}).get("latents")
        }
        if not chosen:
            raise UserError(
                f"no latents of {', '.join(names)} were found in {str(config.folder)!r}: run `sae behavior "
                f"name={config.name}` first, or give wiring.sae=... and wiring.latents=[...]."
            )
    for subject in chosen.values():
        if not (subject.path / "config.json").is_file():
            raise UserError(f"{str(subject.path)!r} is no SAE's folder any more: run `sae behavior` again.")
        site = read_config(subject.path)
        if site.site.kind != "sae":
            raise UserError(f"{str(subject.path)!r} is a {site.site.kind}: give an SAE of one hook point.")
        common.check_belongs(lm, site, subject.path, force=False, remedy="use one of this model")
        wrong = [latent for latent in subject.latents if not 0 <= latent < site.d_sae]
        if wrong:
            raise UserError(f"latent {wrong[0]} is not among the {site.d_sae:,} of {str(subject.path)!r}.")
    return chosen


def _located(folder: Path) -> dict[str, dict[str, float]]:
    """Scores that `sae localize` gave heads and neurons, by method and level, by the parts' labels."""
    found: dict[str, dict[str, float]] = {}
    for level in LEVELS:
        for path in sorted(folder.glob(f"*-{level}-s*.json")):
            parts, scores = read_json(path)["parts"], path.with_suffix(".safetensors")
            if not scores.is_file():
                continue
            seed = path.stem.rsplit("-", 1)[1]
            for method, values in read_tensors(scores).items():
                if len(values) == len(parts):
                    found[f"{method} {level} {seed}"] = dict(zip(parts, values.tolist(), strict=True))
    return found


def _wire(config: RunConfig, lm: LanguageModel, encoder: Any, latent: int, contrast: ContrastSet) -> Wiring:
    options, report = config.wiring, contrast.split("report")
    records = [*report.positives[: options.n_prompts], *report.negatives[: options.n_prompts]]
    return wire(
        lm, encoder, latent, prepare(lm, records), position=options.position, n_ablated=options.n_top,
        null=options.null, n_null=options.n_null, seed=options.seed,
    )  # fmt: skip


def _record(
    behavior: str,
    path: Path,
    encoder: Any,
    wiring: Wiring,
    located: dict[str, dict[str, float]],
    truth: Truth | None,
    config: RunConfig,
) -> dict[str, Any]:
    """What `result.json` says of one latent."""
    sides = {"writers": wiring.writers, "readers": wiring.readers}
    found: dict[str, Any] = {
        "behavior": behavior,
        "path": str(path),
        "hook_name": str(encoder.config.hook_name),
        "latent": wiring.latent,
        "contrast": wiring.contrast,
        "embed": wiring.embed,
        "gap": wiring.gap,
        "singular": wiring.singular,
    }
    for name, side in sides.items():
        found[name] = {
            "strongest": [_part(side, index, wiring.ablated) for index in side.strongest(config.wiring.n_top)],
            "agreement": side.agreement(_planted(side, truth, behavior), config.wiring.seed) if side.parts else None,
            "located": {key: beside_located(side, scores) for key, scores in located.items()},
        }
    return found


def _part(side: Side, index: int, ablated: dict[str, float]) -> dict[str, Any]:
    label = side.parts[index].label
    return {
        "part": label,
        "data": float(side.data[index]),
        "ablated": ablated.get(label),
        "energy": float(side.energy[index]),
        "p": float(side.p[index]),
    }


def _planted(side: Side, truth: Truth | None, behavior: str) -> list[bool] | None:
    """Which parts were planted for the behaviour; None where that is not known."""
    if truth is None:
        return None
    own = {("head", head) for head in truth.layout.heads(behavior)}
    own |= {("neuron", neuron) for neuron in truth.layout.neurons(behavior)}
    reserved = truth.layout.reserved_layers
    return [part.layer in reserved and (part.level, part.number) in own for part in side.parts]


def _print(record: dict[str, Any]) -> None:
    print(
        f"\n{record['behavior']}: latent {record['latent']} at {record['hook_name']}; its pre-activation is "
        f"{record['contrast']:.3g} higher where the behaviour is due, {record['embed']:.2g} of it the embeddings'"
    )
    for side, what in (("writers", "adds to that"), ("readers", "changes without it")):
        rows = record[side]["strongest"]
        if not rows:
            continue
        columns = {"part": side, "data": what, "ablated": "ablated", "energy": "energy", "p": "p"}
        if side == "readers":
            del columns["ablated"]
        print(summary_table([{new: row[old] for old, new in columns.items()} for row in rows], [*columns.values()]))
        print(_agreement(record[side]))


def _agreement(side: dict[str, Any]) -> str:
    found = side["agreement"]
    said = f"weights and prompts agree: Spearman {found.rank.rho:.2f} over {found.rank.n:,} parts"
    if found.first_auroc is not None:
        first, second = found.first_auroc, found.second_auroc
        said += (
            f"; AUROC of the planted ones {first.estimate:.2f} [{first.low:.2f}, {first.high:.2f}] by weights, "
            f"{second.estimate:.2f} [{second.low:.2f}, {second.high:.2f}] on prompts"
        )
    for key, one in side["located"].items():
        if one is not None:
            said += (
                f"\nlocated by {key}: Spearman {one.rank.rho:.2f}, {one.shared} of the first {one.k} in common "
                f"(p = {one.p:.2g})"
            )
    return said
