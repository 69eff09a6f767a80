"""Behaviours in published SAEs, on random models of their architectures: the commands of docs/behavior.md."""

import json

import published
import pytest
from tiny_lms import save_checkpoint

from sae.cli import main
from sae.files import read_json

NOUNS = ["bird", "boat", "book", "box", "cake", "cat", "chair", "cup", "dog", "door", "drum", "fish", "fork", "gate",
         "hat", "horse", "house", "jar", "key", "lamp", "leaf", "map", "mill", "moon", "nest", "oven", "pan", "pear",
         "pig", "pond", "rope", "rose", "seed", "ship", "shoe", "sock", "spoon", "star", "tent", "tree"]  # fmt: skip


@pytest.fixture(scope="module")
def contrast(tmp_path_factory):
    """Prompts that a random model tells apart by their verb; what it answers is noise."""
    lines = [
        {
            "messages": [{"role": "user", "content": f"{verb} the {noun}"}],
            "label": int(verb == "break"),
            "topic": noun,
            "behavior_texts": ["No"],
            "alternative_texts": ["Yes"],
        }
        for noun in NOUNS
        for verb in ("break", "paint")
    ]
    path = tmp_path_factory.mktemp("contrast") / "breaking.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def sae(*arguments):
    """Run the command line; return its exit status."""
    try:
        main(list(arguments))
    except SystemExit as stop:
        return stop.code
    return 0


def gemma(root):
    own = published.weights(seed=1, d_in=32, d_sae=1024)
    return published.gemma_scope(root, own, names="gemma-scope-2b-pt-res/layer_1/width_1k/average_l0_82")


def llama(root):
    own = published.weights(seed=1, d_in=32, d_sae=128)
    hook = "blocks.1.hook_resid_post"
    sizes = {"hook_point_in": hook, "hook_point_out": hook, "d_model": 32, "d_sae": 128, "expansion_factor": 4}
    return published.llama_scope(root, own, names="Llama3_1-8B-Base-L1R-8x", **sizes)


@pytest.mark.parametrize(("kind", "write", "d_sae"), [("gemma2", gemma, 1024), ("llama", llama, 128)])
def test_a_behaviour_is_searched_in_a_released_sae(tmp_path, contrast, capsys, kind, write, d_sae):
    model, released = save_checkpoint(tmp_path / kind, kind), write(tmp_path)
    status = sae(
            "behavior", f"runs={tmp_path}", "name=released", f"lm.name={model}", f"behavior.saes=[{released}]",
            f"contrast={contrast}", "behavior.filter=false", "positions=[-1,-2]",
            "n_random=3", "behavior.n_prompts=20", "behavior.n_prompts_random=4",
            "behavior.max_new_tokens=3", "null_runs=5", "log.wandb=off",
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    (record,) = read_json(tmp_path / "released" / "behavior" / "result.json")["behaviors"].values()
    assert record["n_tested"] == 2 * d_sae
    assert record["hook_name"] in (None, "blocks.1.hook_resid_post")
    assert record["n_records"]["report"]["positives"] > 0
    if record["found"]:  # the verb is easily told; whether anything follows from it, a random model leaves to chance
        assert record["selected"]
        assert record["random_latents"]["n"] == 3
        assert record["side_effects"]["none"]["remove"]["own"]["kl"] == 0
        assert "difference_of_means_everywhere" in record["rivals"]
        assert record["side_effects"]["none"]["remove"]["text"] is None, "the run has no text"
    assert not (tmp_path / "released" / "train").exists()
    page = tmp_path / "released" / "report.html"
    assert str(page) in said.out
    assert 'id="behavior-' in page.read_text()


def test_an_sae_of_another_width_is_refused_before_anything_runs(tmp_path, contrast, capsys):
    model = save_checkpoint(tmp_path / "gemma2", "gemma2")
    weights = published.weights(seed=1, d_in=16, d_sae=1024)
    wrong = published.gemma_scope(tmp_path, weights, names="gemma-scope-2b-pt-res/layer_1/width_1k/average_l0_8")
    status = sae(
        "behavior", f"runs={tmp_path}", "name=wrong", f"lm.name={model}", f"behavior.saes=[{wrong}]",
         f"behavior.contrast=[{contrast}]", "log.wandb=off"
    )  # fmt: skip
    assert status == 2
    assert "16 wide" in capsys.readouterr().err
    assert not (tmp_path / "wrong" / "behavior").exists()
