"""Circuits: exact where they can be, the one way there is where there is one, and the planted parts in the organism."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny_lms import save_checkpoint
from two_steps import PATH, records, save_two_steps

from sae.behavior.contrast import load_contrast
from sae.behavior.measure import margins, prepare_margins
from sae.errors import UserError
from sae.formats.registry import load
from sae.lm.load import load_lm
from sae.organism.corpus import contrast_records
from sae.report.circuit import circuit_svg
from sae.weights.circuits.circuit import CircuitSettings, find_circuit
from sae.weights.circuits.contrasted import contrasted
from sae.weights.circuits.edges import edge_scores
from sae.weights.circuits.files import graphml, write_graph
from sae.weights.circuits.graph import make_nodes, possible, pruned, random_graph, strongest, used
from sae.weights.circuits.members import compare, truth_of
from sae.weights.circuits.patching import Runner
from sae.weights.stream import coordinates_at, open_stream


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_lm(str(save_two_steps(tmp_path_factory.mktemp("toy"))), device="cpu")


@pytest.fixture(scope="module")
def toy_circuit(toy):
    contrast = load_contrast(records(), "danger")
    return find_circuit(toy, contrast, CircuitSettings(n_neurons=4, n_random=5))


@pytest.fixture(scope="module")
def organism():
    return load_lm("organism", device="cpu")


@pytest.fixture(scope="module")
def refusal():
    return load_contrast([dict(record) for record in contrast_records("refusal", 0)], "refusal")


def test_the_graph_of_a_known_path_is_that_path(toy_circuit):
    names = [node.name for node in toy_circuit.nodes]
    found = {(names[source], names[target]) for source, target in np.argwhere(toy_circuit.mask)}
    assert found == PATH
    assert toy_circuit.faithfulness == pytest.approx(1, abs=0.02)
    assert toy_circuit.method == "paired"
    # Random graphs go ways that carry nothing, unless they hit upon the one that does.
    assert np.median(toy_circuit.random) < 0.1


def test_edges_of_a_known_path_are_measured_as_attributed(toy_circuit):
    whole = toy_circuit.margins.model - toy_circuit.margins.empty
    assert len(toy_circuit.checked) == 3
    for edge in toy_circuit.checked:
        assert edge.measured == pytest.approx(whole, rel=0.05)  # each edge of a chain carries all of it
        assert edge.score == pytest.approx(edge.measured, rel=0.25)  # norms bend it


def test_nodes_beside_the_path_score_nothing(toy_circuit):
    on_path = {name for edge in PATH for name in edge}
    silent = [
        abs(float(score))
        for node, score in zip(toy_circuit.nodes, toy_circuit.scores.nodes, strict=True)
        if node.name not in on_path
    ]
    assert len(silent) > 10
    assert max(silent) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_all_edges_are_the_model_and_none_the_other_state(kind, tmp_path):
    lm = load_lm(str(save_checkpoint(tmp_path, kind)), device="cpu")
    rows = [
        {
            "messages": [{"role": "user", "content": text}],
            "label": label,
            "topic": text,
            "behavior_texts": ["Yes"],
            "alternative_texts": ["No"],
        }
        for text, label in (("abcd", 1), ("efgh", 1), ("abzz", 0), ("efzz", 0))
    ]
    made = load_contrast(rows, "x")
    stream = open_stream(lm)
    given = contrasted(lm, stream, made.positives, made.negatives, "paired")
    nodes = make_nodes(stream, 4, {"L1.mlp": [3, 5]})
    runner = Runner(lm, stream, nodes, given)
    own = margins(lm, prepare_margins(lm, made.positives))
    other = margins(lm, prepare_margins(lm, made.negatives))
    assert runner.margins(runner.allowed) == pytest.approx(own, abs=1e-4)
    assert runner.margins(np.zeros_like(runner.allowed)) == pytest.approx(other, abs=1e-4)
    # Two edges fewer, far from every shortcut: still what patching them by hand gives.
    source, target = _index(nodes, "L0.H1"), _index(nodes, "L2.H2")
    mask = runner.allowed.copy()
    mask[source, target] = False
    assert runner.margins(mask) == pytest.approx(_patched_by_hand(lm, stream, given, nodes, source, target), abs=1e-4)


def _index(nodes, name):
    return [node.name for node in nodes].index(name)


def _patched_by_hand(lm, stream, given, nodes, source, target):
    """Path patching in two forwards of one's own: the reader's output without the edge, then the model with it."""
    from sae.behavior.measure import margin_of
    from sae.lm.hooks import edit
    from sae.weights.circuits.contrasted import read_state

    (rows,) = given.rows
    state = read_state(lm, stream, given, rows)
    writer, reader = stream.site(nodes[source].site), stream.site(nodes[target].site)
    columns = torch.from_numpy(nodes[source].coordinates)
    moved = (state.inner[writer.name] - state.corrupt[writer.name])[..., columns] @ writer.weight[:, columns].t()
    clean = lm.activations(rows.clean, stream.hooks)
    without = coordinates_at(lm, reader, rows.clean, (clean[reader.reads] - moved)[None])[0]
    kept = torch.from_numpy(nodes[target].coordinates)
    change = (without - reader.coordinates(clean))[..., kept] @ reader.weight[:, kept].t()
    with edit(lm, {reader.out: lambda acts, step: acts + change}):
        last = lm.logits(rows.clean)[:, -1].float()
    return margin_of(last, rows.behavior_ids, rows.alternative_ids).double().numpy()


def test_scores_add_up_where_all_is_linear(toy):
    """Of a chain, every link's score is the chain's: the sums into the logits and out of the embeddings agree."""
    made = load_contrast(records(), "danger")
    stream = open_stream(toy)
    given = contrasted(toy, stream, made.positives, made.negatives)
    nodes = make_nodes(stream, 4, {})
    scores = edge_scores(toy, stream, nodes, given, n_steps=20)
    assert scores.edges[:, -1].sum() == pytest.approx(scores.edges[0].sum(), rel=0.05)
    assert not scores.edges[~possible(nodes)].any()


def test_the_circuit_of_refusal_is_made_of_the_planted_parts(organism, refusal):
    settings = CircuitSettings(n_neurons=24, n_prompts=12, n_steps=2, n_random=3, n_checked=0, share=0.7)
    found = find_circuit(organism, refusal, settings)
    truth = truth_of(organism, "refusal")
    members = compare(found, truth, "refusal")
    assert members.heads.auroc.estimate > 0.9
    assert members.heads.p < 0.05
    assert members.neurons.right / members.neurons.in_graph > 4 * 192 / 1792
    assert members.neurons.p < 1e-4
    assert members.writers
    assert members.readers
    assert found.faithfulness > 0.6
    assert found.faithfulness > 3 * max(found.random)
    assert found.mask.sum() < 0.1 * possible(found.nodes).sum()
    # Scores of no meaning find other parts.
    rng = np.random.default_rng(0)
    heads = [index for index, node in enumerate(found.nodes) if node.kind == "head"]
    shuffled = found.scores.nodes.copy()
    shuffled[heads] = rng.permutation(shuffled[heads])
    other = compare(_with(found, shuffled), truth, "refusal")
    assert other.heads.auroc.low < 0.8


def _with(circuit, node_scores):
    import dataclasses

    return dataclasses.replace(circuit, scores=circuit.scores._replace(nodes=node_scores))


def test_latents_stand_in_the_way(toy, tmp_path):
    """Behind a cut the path goes through the latents and the rest, and all edges are still the model."""
    from sae.autoencoder.sae import SAE, SAEConfig

    sae = SAE(SAEConfig("topk", 32, 64, 8, 0, "blocks.0.hook_resid_post", toy.name))
    sae.save(tmp_path / "sae")
    made = load_contrast(records(), "danger")
    stream = open_stream(toy, [(load(str(tmp_path / "sae")), [3, 9])])
    given = contrasted(toy, stream, made.positives, made.negatives)
    nodes = make_nodes(stream, 4, {})
    names = [node.name for node in nodes]
    allowed = possible(nodes)
    assert not allowed[names.index("L0.H1"), names.index("L1.H2")]
    assert allowed[names.index("L0.latent 3"), names.index("L1.H2")]
    runner = Runner(toy, stream, nodes, given)
    assert runner.margins(allowed) == pytest.approx(margins(toy, prepare_margins(toy, made.positives)), abs=1e-4)
    scores = edge_scores(toy, stream, nodes, given, n_steps=5)
    through = sum(scores.edges[names.index(name), -1] for name in ("L1.H2",))
    into = sum(scores.edges[names.index(name), names.index("L1.H2")] for name in names if "L0.latent" in name)
    rest = scores.edges[names.index("L0.rest"), names.index("L1.H2")]
    assert into + rest == pytest.approx(through, rel=0.3)


def test_pruning_keeps_ways_only():
    mask = np.zeros((5, 5), dtype=bool)
    for edge in ((0, 1), (1, 4), (0, 2), (3, 4)):  # 2 leads nowhere, 3 comes from nowhere
        mask[edge] = True
    assert {tuple(map(int, edge)) for edge in np.argwhere(pruned(mask))} == {(0, 1), (1, 4)}
    scores = np.where(mask, 1.0, 0.0)
    scores[1, 4] = -3.0  # by size, whatever the sign
    assert strongest(scores, mask, 1).sum() == 0
    assert {tuple(map(int, edge)) for edge in np.argwhere(strongest(scores, mask, 4))} == {(0, 1), (1, 4)}


def test_random_graphs_have_the_size_and_no_dead_edge():
    allowed = np.triu(np.ones((12, 12), dtype=bool), 1)
    for seed in range(5):
        mask = random_graph(allowed, 20, np.random.default_rng(seed))
        assert mask.sum() == 20
        assert (pruned(mask) == mask).all()


def test_files_say_what_the_graph_is(toy_circuit, tmp_path):
    record = write_graph(toy_circuit, tmp_path)
    assert json.loads((tmp_path / "graph.json").read_text()) == record
    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    root = ElementTree.fromstring((tmp_path / "graph.graphml").read_text())
    found = {(edge.get("source"), edge.get("target")) for edge in root.findall(".//g:edge", space)}
    assert found == PATH
    assert {node.get("id") for node in root.findall(".//g:node", space)} == {name for edge in PATH for name in edge}
    assert {key.get("id") for key in root.findall("g:key", space)} == {"kind", "layer", "score", "weight"}
    hostile = {**record, "nodes": [{**record["nodes"][0], "name": '<a b="&">'}], "edges": []}
    assert ElementTree.fromstring(graphml(hostile)).find(".//g:node", space).get("id") == '<a b="&">'


def test_the_picture_shows_every_node_in_order(toy_circuit, tmp_path):
    svg = circuit_svg(write_graph(toy_circuit, tmp_path), "danger <&>", "a note")
    root = ElementTree.fromstring(svg)
    labels = {
        element.text: float(element.get("y"))
        for element in root.iter("{http://www.w3.org/2000/svg}text")
        if element.text in {name for edge in PATH for name in edge} and element.get("class") == "strong"
    }
    assert labels["embed"] > labels["L0.H1"] > labels["L1.H2"] > labels["logits"]
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) == int(toy_circuit.mask.sum())
    assert int(used(toy_circuit.mask).sum()) == len(labels)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"share": 0.0}, "share"),
        ({"corrupt": "zero"}, "zero"),
        ({"attention": "q"}, "attention"),
        ({"n_steps": -1}, "n_steps"),
        ({"n_prompts": 0}, "n_prompts"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        CircuitSettings(**changes)


def test_models_of_other_parts_are_refused(tmp_path):
    lm = load_lm(str(save_checkpoint(tmp_path, "helium")), device="cpu")
    with pytest.raises(UserError, match="does not add just"):
        open_stream(lm)
