"""What a suite measured is shown only while it is about the SAEs that the run has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_fixture import HOOKS, manifest, write_run

from sae.files import sha256_file
from sae.report.html import write_report
from sae.report.read import read_run

OWN = [f"{hook}/topk-{size}-l0_16-s0" for hook in HOOKS[:2] for size in (512, 1024)]
SUITES = ["eval/relations", "eval/geometry", "eval/diff"]


def save(folder: Path, weights: str) -> dict[str, Any]:
    """Write what stands for an SAE; return it as the inputs of a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_text(weights)
    (folder / "config.json").write_text("{}")
    return {
        str(folder): sha256_file(folder / "weights.safetensors"),
        str(folder / "config.json"): sha256_file(folder / "config.json"),
    }


def note(stage: Path, inputs: dict[str, Any]) -> None:
    found = manifest("eval") | {"inputs": {"lm": "ab" * 32, "tokens": "cd" * 32} | inputs}
    (stage / "manifest.json").write_text(json.dumps(found))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with weights, which all its suites noted; moved since."""
    before = write_run(tmp_path / "before" / "demo")
    inputs: dict[str, Any] = {}
    for name in OWN:
        inputs |= save(before / "train" / name, name)
    for suite in ("eval", *SUITES):
        note(before / suite, inputs)
    return before.rename(tmp_path / "demo")


def shown(run: Path) -> list[str]:
    """Suites whose results the report has."""
    data = read_run(run)
    parts = (data.relations.families, data.relations.atoms, data.comparison.crosscoders)
    found = [suite for suite, part in zip(SUITES, parts, strict=True) if part]
    assert [suite for suite in SUITES if suite in [stage.name for stage in data.stages]] == found
    return found + (["eval"] if data.evaluated else [])


def test_what_is_about_the_saes_on_disk_is_shown(run: Path) -> None:
    assert shown(run) == [*SUITES, "eval"]
    assert read_run(run).problems == []
    # Weights may be deleted, or left behind when a run is copied.
    shutil.rmtree(run / "train" / OWN[0])
    assert shown(run) == [*SUITES, "eval"]
    (run / "train" / "result.json").unlink()
    shutil.rmtree(run / "train" / OWN[1])
    assert shown(run) == [*SUITES, "eval"]


@pytest.mark.parametrize("file", ["weights.safetensors", "config.json"])
def test_what_is_about_saes_trained_anew_since_is_left_out(run: Path, file: str) -> None:
    (run / "train" / OWN[2] / file).write_text('{"k": 7}')
    assert shown(run) == []
    data = read_run(run)
    assert len(data.problems) == 4
    assert "eval/relations/result.json is left out" in data.problems[1]
    assert OWN[2] in data.problems[1]
    assert len(data.saes) == 18, "training's own figures stand in"
    text = write_report(run).read_text(encoding="utf-8")
    assert 'id="related"' not in text
    assert "<b>Not shown.</b> eval/relations/result.json is left out" in text


def test_what_is_about_sizes_that_the_run_has_no_more_is_left_out(run: Path) -> None:
    result = json.loads((run / "train" / "result.json").read_text())
    result["saes"] = [row for row in result["saes"] if row["d_sae"] == 512]
    (run / "train" / "result.json").write_text(json.dumps(result))
    for name in OWN:
        if "1024" in name:
            shutil.rmtree(run / "train" / name)
    assert shown(run) == []


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_that_was_not_finished_is_left_out(run: Path, suite: str) -> None:
    (run / suite / "manifest.json").unlink()
    assert shown(run) == [*(other for other in SUITES if other != suite), "eval"]
    (problem,) = read_run(run).problems
    assert problem.startswith(f"{suite}/result.json is left out, since it was not finished")


def test_results_on_given_saes_say_so_and_go_by_their_own_folders(run: Path, tmp_path: Path) -> None:
    """A given SAE lies in another run, in a folder of the same name as one of this run's."""
    elsewhere = tmp_path / "other" / "train" / OWN[0]
    inputs = save(elsewhere, "of another run")
    given = run / "eval" / "given"
    given.mkdir()
    for suite in SUITES[:2]:
        (run / suite).rename(given / Path(suite).name)
        note(given / Path(suite).name, inputs)
    data = read_run(run)
    assert data.problems == []
    assert (data.relations.folder, data.relations.atoms_folder) == ("eval/given/relations", "eval/given/geometry")
    section = write_report(run).read_text(encoding="utf-8").split('<section id="related">')[1].split("</section>")[0]
    assert section.count("These are SAEs that <code>eval.saes</code> named") == 2
    # What was found in the run's own, and has no path, is not theirs.
    assert "latent 4 of 512" not in section
    (elsewhere / "weights.safetensors").write_text("trained anew")
    data = read_run(run)
    assert len(data.problems) == 2
    assert not data.relations.families
    shutil.rmtree(elsewhere)
    assert read_run(run).relations.families, "it may be deleted, or the report made elsewhere"
