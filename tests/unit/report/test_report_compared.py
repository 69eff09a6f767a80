"""What is not a trained autoencoder is marked as such; two models compared are shown, with or without their tensors."""

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import HOOKS, beside, diff, saes, write_norms, write_run
from safetensors.torch import save_file

from sae.report import grid_plots, plots
from sae.report.compared import comparison_view
from sae.report.comparison import N_BINS, read_comparison
from sae.report.grid import counted, grid_view, sae_labels
from sae.report.html import render_report, write_report
from sae.report.model import ReportData, SaeRow
from sae.report.names import told_apart
from sae.report.norm_plot import BETWEEN, FIRST, PAIR, SHARED, norm_histogram
from sae.report.read import read_run, read_sae

SVG = "{http://www.w3.org/2000/svg}"


def classes(svg: str) -> list[str]:
    """Class of every data marker, legend and all."""
    names = [element.attrib.get("class", "") for element in ElementTree.fromstring(svg).iter()]
    return [name for name in names if name.split(" ")[0] in ("dot", "hollow")]


def legend(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# Controls and what was there before


GRID = [SaeRow("blocks.1.hook_mlp_out", d_sae, "topk", 8.0, 0, l0=8.0, fvu=0.4) for d_sae in (64, 128)]
CONTROL = dataclasses.replace(GRID[0], fvu=0.1, control="frozen_decoder")
BEFORE = dataclasses.replace(GRID[1], fvu=0.05, before_training=True)


@pytest.mark.parametrize("draw", [grid_plots.fvu_l0, grid_plots.fvu_size])
def test_what_was_not_trained_is_hollow_and_named_in_the_legend(draw) -> None:
    plain, marked = draw(GRID), draw([*GRID, CONTROL, BEFORE])
    assert not any(name.startswith("hollow") for name in classes(plain))
    assert not {"control", "before training"} & set(legend(plain))
    n_legend = 2  # of the two kinds of hollow markers
    assert sum(name.startswith("hollow") for name in classes(marked)) == 2 + n_legend
    assert sum(name.startswith("dot") for name in classes(marked)) == sum(
        name.startswith("dot") for name in classes(plain)
    )
    assert {"control", "before training"} <= set(legend(marked))
    assert "lowest FVU 0.4" in marked, "what a control reaches is not the best of the grid"
    assert "2 autoencoders, and 2 that are controls" in marked
    assert marked.count("<polyline") == plain.count("<polyline")
    assert "lowest" not in draw([CONTROL])


def test_controls_do_not_decide_which_axis_there_is() -> None:
    assert grid_plots.one_l0([*GRID, dataclasses.replace(CONTROL, l0=80.0)])
    assert grid_plots.one_l0([CONTROL, dataclasses.replace(CONTROL, d_sae=128)])


def test_the_table_marks_them_and_never_makes_them_the_best() -> None:
    found = grid_view(ReportData("x", saes=[BEFORE, CONTROL, *GRID]))
    assert [row["sae"] for row in found["rows"]] == [GRID[0], CONTROL, GRID[1], BEFORE]
    assert [row["best"] for row in found["rows"]] == [True, False, True, False]
    page = render_report(ReportData("x", saes=[BEFORE, CONTROL, *GRID]))
    assert '<span class="tag">control: frozen decoder</span>' in page
    assert '<span class="tag">before training</span>' in page
    assert '<span class="tag">' not in render_report(ReportData("x", saes=GRID))
    assert counted([BEFORE, CONTROL, *GRID]) == "2, 1 control, 1 from before training"
    assert counted(GRID) == "2"
    assert counted([]) == ""


def test_records_say_what_they_are() -> None:
    assert read_sae({"hook_name": "h", "control": "none", "before_training": False}).standing == []
    assert read_sae({"hook_name": "h", "control": "random"}).standing == ["control: random"]
    both = read_sae({"hook_name": "h", "control": "random", "before_training": True})
    assert both.standing == ["control: random", "before training"]
    assert read_sae({"hook_name": "h", "before_training": "no"}).standing == []


def test_curves_of_controls_are_faint() -> None:
    keys = ("topk-64-l0_8-s0", "topk-64-l0_8-s0-random")
    records = [{"step": step, **{f"h/{key}/fvu": 0.5 for key in keys}} for step in (0, 1)]
    svg = plots.training_curves(records, "fvu", "FVU", controls={keys[1]})
    lines = {line[0].text: line.attrib["class"] for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline")}
    assert [name for name, cls in lines.items() if "faint" in cls] == [f"h/{keys[1]}"]
    assert "faint: control" in legend(svg)
    assert "faint" not in plots.training_curves(records, "fvu", "FVU")


def test_no_two_histograms_have_one_name(tmp_path: Path) -> None:
    data = read_run(write_run(tmp_path / "demo"))
    labels = sae_labels(data.saes)
    assert len(set(labels)) == len(labels) == len(saes()) + len(beside())
    given = [dataclasses.replace(GRID[0], path=f"runs/{run}/train/h/topk-64") for run in ("a", "b")]
    assert sae_labels(given) == [f"L1 mlp_out · topk · 64 · L0 8 · {run}" for run in ("a", "b")]


def test_names_are_told_apart_by_what_is_special_about_their_paths() -> None:
    assert told_apart(["a", "b", "a"], ["x/1", "x/2", "y/1"], "-") == ["a-x", "b", "a-y"]
    assert told_apart(["a", "a", "a"], ["x", "x", "x"], "-") == ["a", "a-2", "a-3"]
    assert told_apart(["a", "a"], ["r/a", "r/old/a"], "-") == ["a", "a-old"]
    assert told_apart(["a-x", "a", "a"], ["1", "x", "y"], "-") == ["a-x", "a-x-2", "a-y"]
    assert told_apart([], []) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a-x"]), st.sampled_from(["x", "y/x", "/x", ""])), max_size=6))
def test_told_apart_names_are_always_different(things: list[tuple[str, str]]) -> None:
    names = [name for name, _ in things]
    found = told_apart(names, [path for _, path in things], "-")
    assert len(set(found)) == len(names)
    assert all(one.startswith(name) for one, name in zip(found, names, strict=True))


# Crosscoders


def test_hook_points_of_sites_and_second_models_are_short() -> None:
    hook = "blocks.12.hook_resid_post"
    assert plots.short_hook(f"{hook}+pair.{hook}") == "L12 resid_post + pair L12 resid_post"
    assert plots.short_hook("blocks.1.ln2.hook_normalized->blocks.1.hook_mlp_out") == "L1 ln2.normalized → L1 mlp_out"
    assert plots.short_hook("world") == "world"
    assert plots.short_hook("pair.embed") == "pair.embed"


def test_every_hook_point_of_a_crosscoder_has_a_row(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "demo")).read_text(encoding="utf-8")
    row = next(entry for entry in beside() if entry.get("sources"))
    for source in row["sources"]:
        line = next(line for line in text.splitlines() if f"({source['lm']})" in line and 'class="side"' in line)
        assert f'<td class="num">{source["fvu"]:.3f}</td>' in line
    assert "at pair L1 resid_post (tuned-model)" in text


# Models compared


def norms_of(folder: Path, problems: list[str]) -> list[int]:
    return read_comparison(folder, diff(), problems).crosscoders[0].norm_counts


def test_models_compared_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    text = write_report(run).read_text(encoding="utf-8")
    section = text.split('<section id="models">')[1].split("</section>")[0]
    assert 'href="#models"' in text
    for words in ("base-model", "tuned-model", "3 shrunk, 2 decoupled", "fewer than 20 tokens"):
        assert words in section
    assert section.count('<tr class="best">') == 4, "the confirmed ones among the latents listed"
    assert "3 more are in eval/diff/result.json" in section
    assert "nearer to tuned-model than to both" in section
    assert section.count("<svg") == 1
    (run / "eval" / "diff" / "latents" / "0000.safetensors").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert "so there is no histogram" in text
    assert "3 shrunk, 2 decoupled" in text
    assert "Not shown" not in text
    (run / "eval" / "diff" / "result.json").unlink()
    assert 'id="models"' not in write_report(run).read_text(encoding="utf-8")


def test_relative_norms_are_counted_over_the_latents_that_are_judged(tmp_path: Path) -> None:
    write_norms(tmp_path)
    problems: list[str] = []
    counts = norms_of(tmp_path, problems)
    assert (len(counts), sum(counts), problems) == (N_BINS + 1, 825, [])
    assert (counts[0], counts[-1]) == (9, 10)
    assert sum(counts[int(0.41 * len(counts)) : int(0.6 * len(counts))]) == 800
    save_file({"relative_norm": torch.tensor([0.0, 0.5, 1.0])}, tmp_path / "latents" / "0000.safetensors")
    counts = norms_of(tmp_path, problems)
    assert [place for place, count in enumerate(counts) if count] == [0, N_BINS // 2, N_BINS]


def test_tensors_that_are_broken_are_a_problem_and_others_are_not_read(tmp_path: Path) -> None:
    folder, problems = tmp_path / "diff", []
    (folder / "latents").mkdir(parents=True)
    assert norms_of(folder, problems) == []
    assert problems == []
    (folder / "latents" / "0000.safetensors").write_bytes(b"not tensors")
    assert norms_of(folder, problems) == []
    assert len(problems) == 1
    assert "not a safetensors file" in problems[0]
    save_file({"relative_norm": torch.tensor([0.5])}, tmp_path / "other.safetensors")
    (record,) = diff()["crosscoders"]
    outside = {"crosscoders": [record | {"tensors": "../other.safetensors"}]}
    assert read_comparison(folder, outside, problems).crosscoders[0].norm_counts == []
    assert len(problems) == 1


def test_crosscoders_given_are_shown_where_the_run_has_none_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    (run / "eval" / "given").mkdir()
    (run / "eval" / "diff").rename(run / "eval" / "given" / "diff")
    (row,) = read_run(run).comparison.crosscoders
    assert sum(row.norm_counts) == 825
    assert row.first_only.confirmed == 4
    text = write_report(run).read_text(encoding="utf-8")
    section = text.split('<section id="models">')[1].split("</section>")[0]
    assert "The crosscoders are those that <code>eval.saes</code> named" in section
    assert "3 more are in eval/given/diff/result.json" in section
    assert "<code>eval.saes</code>" not in write_report(write_run(tmp_path / "own")).read_text(encoding="utf-8")


def test_bars_have_the_colour_of_their_zone() -> None:
    counts = [0] * 20
    for norm in (0.02, 0.3, 0.5, 0.95):
        counts[int(norm * 20)] = 5
    bars = [
        element
        for element in ElementTree.fromstring(norm_histogram(counts, 0.1, 0.1, "x")).iter(f"{SVG}rect")
        if element.find(f"{SVG}title") is not None
    ]
    assert [bar.attrib["class"] for bar in bars] == [f"bar k{colour}" for colour in (FIRST, BETWEEN, SHARED, PAIR)]
    assert len({bar.attrib["height"] for bar in bars}) == 1
    assert "no data to draw" in norm_histogram([], 0.1, 0.1, "x")


def test_many_crosscoders_are_folded_and_told_apart(tmp_path: Path) -> None:
    (record,) = diff()["crosscoders"]
    records = [record | {"path": f"runs/{name}/train/x"} for name in "abcde"]
    records[0] |= {"control": "random"}
    view = comparison_view(read_comparison(tmp_path, {"crosscoders": records}, []))
    assert view is not None
    labels = [label for label, _ in view["rows"]]
    assert len(set(labels)) == 5
    assert labels[-1].endswith("control: random"), "controls come last"
    assert (len(view["open"]), len(view["folded"])) == (3, 2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["first_only", "first_latents", "tensors", "d_sae", "hook_name", "shared", "l0_target", "seed"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(names, json_values), max_size=2), st.dictionaries(st.text(max_size=6), json_values))
def test_any_json_is_read_without_an_error(entries: list[dict[str, object]], result: dict[str, object]) -> None:
    found = read_comparison(Path("absent"), {**result, "crosscoders": entries}, [])
    source = {"hook_name": HOOKS[0], "sources": [entries, *entries], "fvu": 0.1}
    page = render_report(ReportData("x", saes=[read_sae(source)], comparison=found))
    assert ("Models compared" in page) == bool(entries)
    json.dumps(dataclasses.asdict(found))
