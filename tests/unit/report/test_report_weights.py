"""The page's section on weights: what is in it, that nothing shows without results, and that broken ones do no harm."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.files import to_plain
from sae.report.html import render_report
from sae.report.read import read_run
from sae.report.read_weights import read_weights
from sae.weights.adversary import Adversary, Attacked, Removed, Seen

SEEN = Attacked(Seen(-6.6, 0.0), Seen(1.0, 0.4))


def removed(epsilon, comes_back):
    """What the search for a worst case gives for one ball of masks."""
    return Removed("ball", 1 - epsilon, 1 + epsilon, SEEN, SEEN, SEEN, comes_back)


RATE = {"rate": 0.25, "low": 0.1, "high": 0.4, "n": 64}
LOCALIZE = {
    "methods": [
        {"behavior": "refusal", "method": "taylor_difference", "level": "head", "auroc": 0.855, "auprc": 0.653,
         "base_rate": 0.125, "decoy_share": 0.0, "evaluations": 3, "seed": 0},
    ],
    "surgery": [
        {"behavior": "refusal", "method": "taylor", "level": "head", "fraction": 0.0114, "behavior_before": 1.0,
         "behavior_after": 0.0, "degenerate_after": 0.0, "other_max_change": 0.005, "kl_harmless": 4e-6,
         "random_after": 0.99, "passed": True,
         "adversary": to_plain(Adversary(64, (removed(0.02, False), removed(0.05, True), removed(0.1, None)), ()))},
        {"behavior": "refusal", "method": "snip", "level": "head", "passed": False, "adversary": None},
    ],
}  # fmt: skip
PART = {"part": "L1.H11", "data": 4.903, "ablated": 4.084, "energy": 55.59, "p": 0.001}
WIRING = {
    "latents": [
        {"behavior": "refusal", "hook_name": "blocks.1.hook_resid_post", "latent": 127, "contrast": 6.97,
         "writers": {"strongest": [PART]}, "readers": {"strongest": [PART | {"part": "L3.N268", "ablated": None}]}},
    ],
}  # fmt: skip
CIRCUIT = {
    "behavior": "refusal", "n_nodes": 3, "n_edges": 2, "n_possible": 7590, "faithfulness": 0.884, "cpr": 0.99,
    "cmd": 0.02, "interval": {"low": 0.853, "high": 0.913}, "random": {"mean": 0.02, "max": 0.12},
}  # fmt: skip
NODES = [("embed", 0, "embed"), ("L1.H11", 1, "head"), ("logits", 2, "logits")]
GRAPH = {
    "nodes": [{"name": name, "layer": layer, "kind": kind, "score": 1.5} for name, layer, kind in NODES],
    "edges": [
        {"source": "embed", "target": "L1.H11", "weight": 2.5},
        {"source": "L1.H11", "target": "logits", "weight": -1.0},
    ],
}
MITIGATE = {
    "behavior": "refusal",
    "methods": [
        {"method": "prune", "behavior_before": RATE | {"rate": 1.0}, "behavior_after": RATE, "restored_after": RATE,
         "other_max_change": 0.0, "facts": RATE, "kl_harmless": 0.0016, "n_changed": 541, "relearn_steps": 3,
         "prefix": RATE, "steering": RATE},
    ],
}  # fmt: skip


def page(folder, **results):
    for stage, result in results.items():
        (folder / stage).mkdir()
        (folder / stage / "result.json").write_text(json.dumps(result))
    return render_report(read_run(folder))


def test_the_section_has_what_was_found(tmp_path):
    (tmp_path / "circuit").mkdir()
    (tmp_path / "circuit" / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "circuit" / "result.json").write_text(json.dumps(CIRCUIT))
    text = page(tmp_path, localize=LOCALIZE, wiring=WIRING, mitigate=MITIGATE)
    assert 'href="#weights"' in text
    section = text[text.index('<section id="weights">') :]
    section = section[: section.index("</section>")]
    heads = re.findall(r"<h3>([^<]*)</h3>", section)
    assert heads == ["Located", "Cut", "refusal: latent 127 at L1 resid_post", "Circuit of refusal", "Mitigated"]
    for words in (
        "taylor difference", "0.855", "yes, at masks of 5%", "2 of 7,590 edges between 3 nodes", "0.853 to 0.913",
        "541", "embed to L1.H11: 2.5 nats", "L3.N268", "6.97 higher where the behaviour is due",
    ):  # fmt: skip
        assert words in section, words
    assert section.count('class="best"') == 1  # the cut that passed every bar


def test_nothing_is_shown_where_nothing_was_looked_for(tmp_path):
    assert 'id="weights"' not in page(tmp_path, train={"saes": []})


@pytest.mark.parametrize("broken", ["[1]", "{", '{"nodes": 3, "edges": [{"source": "a"}]}'])
def test_a_broken_graph_leaves_the_rest(tmp_path, broken):
    (tmp_path / "circuit").mkdir()
    (tmp_path / "circuit" / "graph.json").write_text(broken)
    text = page(tmp_path, localize=LOCALIZE)
    assert "Located" in text
    assert "Circuit of" not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CIRCUIT, *PART, "methods"]), inner),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(["localize", "wiring", "circuit", "mitigate"]), st.dictionaries(
    st.sampled_from(["methods", "surgery", "latents", "behavior", "interval", "random"]), JSON)), JSON)  # fmt: skip
def test_whatever_is_in_the_files_can_be_read(results, graph):
    found = read_weights(results, graph)
    assert found.circuit is None
