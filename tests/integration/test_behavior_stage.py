"""What `sae behavior` reads beside its contrast sets, what its results depend on, and whose judge decides."""

import csv
import dataclasses
import json

import pytest

from sae import plugins
from sae.behavior.judge import Verdict
from sae.behavior.judges import registry
from sae.behavior.judges.endpoint import EndpointJudge
from sae.config import DataConfig, LMConfig, RunConfig
from sae.errors import UserError
from sae.stages import behavior, common
from sae.stages.contrast import open_contrasts, open_lookalikes

TABLE = ("prompt", "label", "topic", "behavior_texts", "alternative_texts")


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([TABLE, *rows])
    return path


def rows(start, n):
    return [(f"say thing {index}", index % 2, f"t{index}", "Dear", "No") for index in range(start, start + n)]


@pytest.fixture
def config(tmp_path, model, text):
    """A run with two tables of prompts, and one question."""
    table = write_table(tmp_path / "greeting.csv", rows(0, 60))
    near = write_table(tmp_path / "near.csv", rows(40, 60))
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}) + "\n")
    made = RunConfig(runs=str(tmp_path), lm=LMConfig(name=str(model), device="cpu"), data=DataConfig(path=str(text)))
    made.behavior.contrast = [str(table)]
    made.behavior.lookalikes, made.behavior.choices = str(near), str(choices)
    return made


def test_lookalikes_were_not_searched_on(config):
    found = open_lookalikes(config, None)
    searched = open_contrasts(config, None)["greeting"].contrast
    assert 0 < len(found) < 30
    assert {record.split for record in found} == {"report"}
    before = {record.prompt for record in searched.records if record.split != "report"}
    assert not before & {record.prompt for record in found}
    config.behavior.lookalikes = ""
    assert open_lookalikes(config, None) == []


def test_lookalikes_in_no_report_split_are_refused(config, tmp_path):
    kept = [(*row, "find") for row in rows(0, 20)]
    with (tmp_path / "near.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(*TABLE, "split"), *kept])
    with pytest.raises(UserError, match="no negatives in its report split"):
        open_lookalikes(config, None)


def test_the_data_files_of_lookalikes_have_names_too(config, tmp_path):
    path = tmp_path / "prompts.csv"
    found = [f"{n},{kind} {n} is it,a,{kind},word{n // 2}," for n in range(80) for kind in ("safe", "unsafe")]
    path.write_text("\n".join(["id,prompt,type,label,focus,note", *found]))
    config.behavior.lookalikes, config.behavior.files = "xstest", {"xstest": str(path)}
    assert list(open_contrasts(config, None)) == ["greeting"]
    assert len(open_lookalikes(config, None)) > 10
    config.behavior.files = {"xtest": str(path)}
    with pytest.raises(UserError, match="did you mean xstest"):
        open_contrasts(config, None)


@pytest.mark.parametrize("changed", ["lookalikes", "choices", "contrast", "data"])
def test_results_are_of_other_texts_when_any_of_them_changes(config, tmp_path, changed):
    lm = common.open_lm(config.lm)

    def hashes():
        return behavior.text_inputs(config, open_contrasts(config, None), behavior.read_beside(config, lm))

    before = hashes()
    assert hashes() == before
    if changed == "choices":
        question = {"question": "1 + 2?", "choices": ["2", "3"], "answer": 1}
        (tmp_path / "choices.jsonl").write_text(json.dumps(question) + "\n")
    elif changed == "data":
        config.data = dataclasses.replace(config.data, n_eval_tokens=config.data.n_eval_tokens + 1)
    else:
        write_table(tmp_path / {"lookalikes": "near.csv", "contrast": "greeting.csv"}[changed], rows(30, 90))
    assert hashes() != before


def test_a_judge_for_some_models_is_theirs(config, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", [])

    def mine(completion, record):
        return Verdict.BEHAVIOR

    lm = common.open_lm(config.lm)
    registry.register_judge("greeting", mine, lm.name)
    assert registry.judge_for("greeting", behavior.judged_as("greeting", set(), lm)) is mine
    assert registry.judge_for("other", behavior.judged_as("other", set(), lm)) is not mine
    assert behavior.judged_as("refusal", {"refusal"}, lm) == common.ORGANISM


def test_results_are_of_another_judge_when_the_judge_changes(config, tmp_path, monkeypatch):
    """A plugin whose text changes, a fitted judge's weights, an endpoint's model: each is another judge."""
    monkeypatch.setattr(registry, "_REGISTRY", [])
    lm = common.open_lm(config.lm)
    contrasts = {name: item.contrast for name, item in open_contrasts(config, lm).items()}

    def hashes():
        return behavior.judge_inputs(contrasts, config, lm)

    found = [hashes()]
    assert hashes() == found[0]
    plugin = tmp_path / "mine.py"
    for word in ("dear", "Dear"):
        plugin.write_text(
            "from sae.behavior.judge import Verdict\nfrom sae.behavior.judges.registry import register_judge\n"
            f"WORD = {word!r}\n"
            "def mine(completion, record):\n"
            "    return Verdict.BEHAVIOR if WORD in completion else Verdict.ALTERNATIVE\n"
            "register_judge('greeting', mine)\n"
        )
        plugins.load([str(plugin)])
        found.append(hashes())
    for judge in (
        EndpointJudge("http://localhost:1/v1", "one"),
        EndpointJudge("http://localhost:1/v1", "two"),
        EndpointJudge("http://localhost:2/v1", "two"),
    ):
        registry.register_judge("greeting", judge)
        found.append(hashes())
    assert len({json.dumps(item, sort_keys=True) for item in found}) == len(found)
    registry.register_judge("other", EndpointJudge("http://localhost:3/v1", "three"))
    assert hashes() == found[-1], "a judge of something else changes nothing"


def test_sets_are_balanced_in_the_tokens_of_the_model_that_reads_them(config, tmp_path):
    """Positives of more bytes, which are this model's tokens, in equally many characters."""
    words = ("\u00e9\u00e9\u00e9\u00e9", "eeee")
    told = [
        (
            f"say {' '.join(words[(index * 7 + place * 3 + index % 2) % 3 > 0] for place in range(9))} {index:03}",
            index % 2,
        )
        for index in range(400)
    ]
    table = write_table(
        tmp_path / "greeting.csv", [(text, label, f"t{n // 2}", "Dear", "No") for n, (text, label) in enumerate(told)]
    )
    config.behavior.contrast, config.behavior.balance = [str(table)], "match"
    config.behavior.balance_features = ["length"]
    lm = common.open_lm(config.lm)
    (by_model,), (by_text,) = (open_contrasts(config, model).values() for model in (lm, None))
    assert (by_model.balanced.length_unit, by_text.balanced.length_unit) == ("tokens", "characters")
    assert len(by_text.contrast) == 400

    def lengths(contrast, split, label):
        texts = [record.prompt for record in contrast.records if record.split == split and record.label is label]
        return sorted(len(text.encode()) for text in texts)

    for split in ("find", "select", "report"):
        assert lengths(by_model.contrast, split, True) == lengths(by_model.contrast, split, False)
        assert lengths(by_text.contrast, split, True) != lengths(by_text.contrast, split, False)
