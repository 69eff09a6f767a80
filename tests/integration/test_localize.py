"""`sae localize` from the command line: on the organism, with one more method later, and where nothing is planted."""

import json
from pathlib import Path

import pytest

from sae.weights.perturbation import registry

QUICK = ("localize.n_prompts=8", "localize.n_report=16", "localize.fractions=[0.006]", "localize.n_random=1")


def result(sae, name):
    return json.loads((sae.folder / name / "localize" / "result.json").read_text())


def test_methods_on_the_organism_and_one_more_later(sae):
    given = ("name=o", "lm=organism", "contrast=refusal", "level=head", *QUICK, "localize.seeds=2")
    status, _, err = sae("localize", *given, "method=[taylor]", defaults=False)
    assert status == 0, err
    first = result(sae, "o")
    assert [row["method"] for row in first["methods"]] == ["taylor", "taylor_set_difference", "taylor_difference"]
    row = first["methods"][0]
    assert row["auroc"] > 0.6
    assert 0 < row["base_rate"] < 0.5
    assert (row["behavior"], row["level"], row["evaluations"], row["seed"]) == ("refusal", "head", 3, 0)
    cut = first["surgery"][0]
    assert cut["behavior_before"] == 1.0
    assert cut["fraction"] <= 0.006
    assert {"behavior_after", "other_max_change", "kl_harmless", "random_after"} <= cut.keys()
    record = sae.folder / "o" / "localize" / "refusal" / "taylor-head-s0.json"
    written = record.stat().st_mtime_ns
    assert record.with_suffix(".safetensors").is_file()
    status, _, err = sae("localize", *given, "method=[taylor,random]", defaults=False)
    assert status == 0, err
    assert record.stat().st_mtime_ns == written
    second = result(sae, "o")
    assert second["methods"][:3] == first["methods"]
    assert [row["seed"] for row in second["methods"][3:]] == [0, 1]
    assert [row["n_seeds"] for row in second["seeds"]] == [2]


def test_the_worst_case_and_blocks_on_the_organism(sae):
    given = ("name=w", "lm=organism", "contrast=refusal", *QUICK, "localize.seeds=1", "localize.budget=30")
    attacks = ("localize.adversary=true", "localize.epsilons=[0.05]", "localize.attack_steps=2")
    few = ("localize.attack_restarts=1", "localize.n_blocks=2")
    status, _, err = sae("localize", *given, "method=[adaptive]", "level=[head,block]", *attacks, *few, defaults=False)
    assert status == 0, err
    head, block = result(sae, "w")["surgery"]
    worst = head["adversary"]
    assert [(one["box"], one["low"], one["high"]) for one in worst["removed"]] == [("ball", 0.95, 1.05), ("free", 0, 2)]
    for one in worst["removed"]:
        assert one["located"]["after"]["margin"] > one["located"]["before"]["margin"]
        assert {"random", "not_due", "comes_back"} <= one.keys()
    (kept,) = worst["kept"]
    assert kept["located"]["after"]["margin"] < kept["random_worst"]["margin"]
    assert (block["level"], block["adversary"], block["mode"]) == ("block", None, "project")
    assert 0 < block["fraction"] <= 0.006


def test_shuffled_labels_from_the_command_line_are_kept_for_later(sae):
    given = ("name=n", "lm=organism", "contrast=refusal", *QUICK, "localize.surgery=false", "level=[head,direction]")
    given = (*given, "localize.null_runs=2", "localize.rank=2")
    status, _, err = sae("localize", *given, "method=[taylor,act_svd]", defaults=False)
    assert status == 0, err
    (null,) = result(sae, "n")["null"]
    assert (null["method"], null["level"], null["n_runs"]) == ("taylor", "head", 2)
    assert null["auroc"]["low"] <= null["auroc"]["estimate"] <= null["auroc"]["high"]
    written = (sae.folder / "n" / "localize" / "refusal" / "null.json").stat().st_mtime_ns
    (sae.folder / "n" / "localize" / "manifest.json").unlink()
    status, _, err = sae("localize", *given, "method=[taylor,act_svd]", defaults=False)
    assert status == 0, err
    assert (sae.folder / "n" / "localize" / "refusal" / "null.json").stat().st_mtime_ns == written
    assert result(sae, "n")["null"] == [null]


def test_a_model_without_planted_truth_and_its_base(sae, model, tmp_path):
    path = tmp_path / "greeting.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"say thing {index * 7919}"}], "label": index % 2,
            "topic": f"t{index}", "behavior_texts": ["Dear"], "alternative_texts": ["No"],
        }
        for index in range(120)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = (*QUICK, "localize.surgery=false", "behavior.max_new_tokens=4", "localize.ig_steps=2", "localize.rank=2")
    quick = (*quick, "localize.budget=40", "localize.seeds=2")
    status, _, err = sae(
        "localize", "name=m", f"contrast={path}", "method=all", "level=all", f"reference={model}", *quick
    )
    assert status == 0, err
    rows = result(sae, "m")["methods"]
    assert all(row["auroc"] is None and row["base_rate"] is None for row in rows)
    levels = {"parameter", "row", "column", "neuron", "head", "tensor", "block", "direction"}
    assert {row["level"] for row in rows} == levels
    assert {row["method"] for row in rows if row["level"] == "block"} == {*registry.METHODS, "chance"}
    assert "decomposition" not in {row["method"] for row in rows}  # named only
    assert {"snip", "wanda_difference", "act_svd", "weight_difference", "chance"} <= {row["method"] for row in rows}
    assert result(sae, "m")["surgery"] == []


def test_a_decomposition_is_made_once_for_all_behaviours(sae):
    own = [f"localize.decomposition.{one}" for one in ("steps=3", "batch=4", "n_prompts=4", "hidden=4", "n_measured=3")]
    given = ("name=d", "lm=organism", "contrast=[refusal,style]", *QUICK, "localize.surgery=false", *own)
    status, _, err = sae("localize", *given, "method=[decomposition]", "level=[parameter,head]", defaults=False)
    assert status == 0, err
    found = result(sae, "d")
    assert {(row["behavior"], row["method"], row["level"]) for row in found["methods"]} == {
        (name, f"decomposition{end}", level)
        for name in ("refusal", "style") for end in ("", "_set_difference", "_difference")
        for level in ("parameter", "head")
    }  # fmt: skip
    assert all(0 < row["auprc"] < 1 for row in found["methods"])
    assert found["decomposition"]["adversarial"] >= found["decomposition"]["stochastic"]
    (made,) = (sae.folder / "d" / "localize").glob("decomposition-*")
    listed = json.loads((sae.folder / "d" / "localize" / "refusal" / "decomposition.json").read_text())
    assert Path(listed["decomposition"]).name == made.name
    assert [one["effect"] is None for one in listed["behavior"][:4]] == [False] * 3 + [True]
    written = (made / "components.safetensors").stat().st_mtime_ns
    use = ("method=[decomposition]", "level=[row]", f"localize.decomposition.folder={made}")
    status, _, err = sae("localize", *given, *use, defaults=False)
    assert status == 0, err
    assert (made / "components.safetensors").stat().st_mtime_ns == written
    assert len(list((sae.folder / "d" / "localize").glob("decomposition-*"))) == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=magic"], "'magic'"),
        (["level=layer"], "'layer'"),
        (["method=weight_difference"], "localize.reference"),
        (["localize.mode=restore"], "localize.reference"),
        (["localize.fractions=[2]"], "localize.fractions"),
        (["localize.mode=cut"], "'cut'"),
        (["localize.decomposition.steps=0"], "localize.decomposition.steps"),
        (["method=decomposition", "localize.decomposition.folder=nowhere"], "nowhere"),
        (["localize.adversary=true", "localize.surgery=false"], "localize.adversary"),
        (["localize.epsilons=[0]"], "localize.epsilons"),
        (["localize.null_runs=2", "method=act_svd"], "localize.null_runs"),
        (["method=taylor", "level=block"], "taylor score nothing at the level of block"),
    ],
)
def test_bad_options_are_one_sentence(sae, overrides, named):
    status, _, err = sae("localize", "name=bad", "lm=organism", "contrast=refusal", *overrides, defaults=False)
    assert status == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1
