"""`sae circuit contrast=refusal`: the smallest graph of a model's parts that keeps a behaviour, and its picture.

Writes `circuit/`: `graph.json`, `graph.graphml`, `graph.svg`, and `result.json` with what was measured.
"""

from pathlib import Path
from typing import Any

from sae.autoencoder.sae import SAE, read_config
from sae.config import RunConfig
from sae.errors import UserError
from sae.files import sha256_json, to_plain, write_json, write_manifest, write_text
from sae.lm.model import LanguageModel
from sae.report.circuit import circuit_svg
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import open_contrasts
from sae.stages.opened import opened_saes
from sae.weights.circuits.circuit import Circuit, CircuitSettings, find_circuit
from sae.weights.circuits.files import write_graph
from sae.weights.circuits.members import compare, truth_of

N_TOP = 20


def make_settings(config: RunConfig) -> CircuitSettings:
    """The search's settings."""
    options = config.circuit
    return CircuitSettings(
        share=options.share,
        corrupt=options.corrupt,
        attention=options.attention,
        n_neurons=options.n_neurons,
        n_steps=options.n_steps,
        n_prompts=options.n_prompts,
        n_random=options.n_random,
        n_checked=options.n_checked,
        seed=options.seed,
    )


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "circuit")
    names = config.behavior.contrast
    if len(names) != 1:
        raise UserError(f"`sae circuit` draws one behaviour, not {names}: say which with contrast=..., a run each.")
    settings = make_settings(config)
    clock = common.Clock()
    lm = common.open_lm(config.lm)
    ((name, opened),) = open_contrasts(config, lm).items()
    contrast = opened.contrast
    if contrast.unanswerable:
        raise UserError(f"the contrast set of {name!r} has no margin, since {contrast.unanswerable}: give another.")
    path = _sae(config, lm)
    folder = config.folder / "circuit"
    inputs = {"lm": common.model_key(lm), name: sha256_json(contrast.records)}
    inputs |= common.sae_inputs([path] if path else [], folder)
    noted = {"settings": settings, "behavior": name, "sae": str(path or ""), "latents": config.circuit.latents}
    if common.skip(config, folder, noted, inputs):
        return
    cuts = [(SAE.load(path, device=lm.device), list(config.circuit.latents))] if path else []
    circuit = _find(lm, contrast, settings, cuts)
    record = write_graph(circuit, folder)
    truth = truth_of(lm, name)
    result = {
        "schema_version": 1,
        "behavior": name,
        **summarise(circuit, record),
        "planted": None if truth is None else compare(circuit, truth, name),
        "settings": noted,
        "wall_s": clock.seconds(),
    }
    note = f"{result['n_edges']:,} of {result['n_possible']:,} edges keep {circuit.faithfulness:.0%} of the margin"
    if circuit.random:
        note += f"; random graphs of as many {result['random']['mean']:.0%}"
    write_text(folder / "graph.svg", circuit_svg(record, f"{name} in {lm.name}", note))
    write_json(folder / "result.json", result)
    _print(name, circuit, result)
    write_manifest(folder, "circuit", noted, inputs)
    print(f"{folder}: graph.svg, graph.graphml, graph.json, result.json in {clock.seconds():.1f} s")


def _sae(config: RunConfig, lm: LanguageModel) -> Path | None:
    """The SAE whose latents are nodes, if any."""
    if not config.circuit.sae:
        return None
    (path,) = opened_saes(config, [config.circuit.sae])
    found = read_config(path)
    if found.site.kind != "sae":
        raise UserError(f"{str(path)!r} is a {found.site.kind}: latents in a circuit need an SAE of one hook point.")
    common.check_belongs(lm, found, path, force=False, remedy="use one of this model")
    return path


def _find(lm: LanguageModel, contrast: Any, settings: CircuitSettings, cuts: list[tuple[Any, list[int]]]) -> Circuit:
    with Progress(None, "circuit", unit="step") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.update(1, now=f"{what} {done}/{total}")

        return find_circuit(lm, contrast, settings, cuts, progress)


def summarise(circuit: Circuit, record: dict[str, Any]) -> dict[str, Any]:
    """What `result.json` says of a circuit."""
    random = circuit.random
    found: dict[str, Any] = to_plain(
        {
            "n_nodes": len(record["nodes"]),
            "n_edges": len(record["edges"]),
            "n_possible": circuit.curve[-1].n_asked,
            "faithfulness": circuit.faithfulness,
            "interval": circuit.interval,
            "reached": circuit.reached,
            "margins": circuit.margins,
            "random": {
                "mean": sum(random) / len(random) if random else None,
                "max": max(random, default=None),
                "p": circuit.random_p,
                "values": random,
            },
            "cpr": circuit.cpr,
            "cmd": circuit.cmd,
            "curve": circuit.curve,
            "top_edges": record["edges"][:N_TOP],
            "checked": circuit.checked,
            "agreement": circuit.agreement,
            "corrupt": circuit.method,
            "n_prompts": circuit.n_prompts,
        }
    )
    return found


def _print(name: str, circuit: Circuit, result: dict[str, Any]) -> None:
    low, high = circuit.interval.low, circuit.interval.high
    print(
        f"\n{name}: {result['n_nodes']} nodes and {result['n_edges']:,} of {result['n_possible']:,} edges keep "
        f"{circuit.faithfulness:.2f} [{low:.2f}, {high:.2f}] of the margin on prompts held out; "
        f"CPR {circuit.cpr:.2f}, CMD {circuit.cmd:.2f}"
    )
    if not circuit.reached:
        print("no smaller graph kept the share that was asked: all edges are in it")
    if circuit.random:
        mean, most = result["random"]["mean"], result["random"]["max"]
        print(f"{len(circuit.random)} random graphs of as many edges keep {mean:.2f} (at most {most:.2f})")
    rows = [
        {"from": edge.source, "to": edge.target, "attributed": edge.score, "measured": edge.measured}
        for edge in circuit.checked
    ]
    if rows:
        print(summary_table(rows, list(rows[0])))
