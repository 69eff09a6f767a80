"""`sae circuit` from the command line: what it writes, that it is kept, and what it refuses."""

import json

import pytest

FAST = (
    "circuit.n_neurons=2",
    "circuit.attention=whole",
    "circuit.n_random=2",
    "circuit.n_steps=1",
    "circuit.n_checked=2",
)


def test_a_circuit_is_written_and_kept(sae, greeting):
    status, out, err = sae("circuit", "name=c", f"contrast={greeting}", *FAST)
    assert status == 0, err
    folder = sae.folder / "c" / "circuit"
    assert {path.name for path in folder.iterdir()} == {
        "graph.graphml",
        "graph.json",
        "graph.svg",
        "manifest.json",
        "result.json",
    }
    result = json.loads((folder / "result.json").read_text())
    graph = json.loads((folder / "graph.json").read_text())
    assert result["n_nodes"] == len(graph["nodes"])
    assert result["n_edges"] == len(graph["edges"])
    assert result["corrupt"] == "paired"
    assert result["planted"] is None
    assert len(result["random"]["values"]) == 2
    assert result["curve"][-1]["faithfulness"] == pytest.approx(1, abs=1e-4)
    assert f"{result['n_nodes']} nodes" in out
    assert "done before" in sae("circuit", "name=c", f"contrast=[{greeting}]", *FAST)[1]


def test_the_runs_own_contrasts_are_left_alone(sae, greeting):
    assert sae("circuit", "name=c", f"contrast={greeting}", *FAST)[0] == 0
    recipe = json.loads((sae.folder / "c" / "recipe.json").read_text())
    assert not any(item.startswith("behavior.contrast") for item in recipe["overrides"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("behavior.contrast=[a.jsonl,b.jsonl]",), "one behaviour"),
        (("share=2",), "circuit.share"),
        (("circuit.latents=[1]",), "circuit.sae"),
        (("corrupt=none",), "corrupt"),
    ],
)
def test_mistakes_are_said_in_a_sentence(sae, greeting, given, named):
    contrast = () if "contrast" in given[0] else (f"contrast={greeting}",)
    status, _, err = sae("circuit", "name=bad", *contrast, *given)
    assert status == 2
    assert named in err
    assert err.count("\n") == 1
    assert not (sae.folder / "bad" / "circuit").exists()
