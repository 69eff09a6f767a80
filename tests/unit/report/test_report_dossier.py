"""A behaviour's dossier: what stands beside the causal test is read, drawn and shown, and what is missing is named."""

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from dossier_fixture import PARTED, evidence, rivals
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import HOSTILE, behavior, rate

from sae.report.background_view import confounds_view
from sae.report.dossier import MAX_PAIRS, behavior_view
from sae.report.dossier_plots import Dot, attributed, pareto, size_curve, spaced
from sae.report.evidence import Behavior, Interval, Rate, SizePoint
from sae.report.html import render_report
from sae.report.model import ReportData
from sae.report.outcome import COLUMNS, outcome_text
from sae.report.read_behavior import read_behavior
from sae.report.read_evidence import read_evidence
from sae.report.rivals_view import cost_tables, rivals_table
from sae.report.tables import Column, Line, interval_cell, table, text_cell


def read(**changes: Any) -> Behavior:
    return read_behavior("refusal", behavior("refusal", 0.06, "x") | evidence() | changes)


def page(*found: Behavior, redact: bool = False) -> str:
    return render_report(ReportData(name="x", behaviors=list(found)), redact=redact)


def test_everything_that_is_written_is_read() -> None:
    found = read().evidence
    assert found.found is True
    assert (found.n_tested, found.n_significant, found.n_significant_shuffled) == (3072, 71, 0)
    assert found.n_records["report"]["positive_topics"] == 6
    assert found.dropped == {"positives": 9, "negatives": 42}
    chosen = found.rivals[0]
    assert (chosen.method, chosen.restored and chosen.restored.rate, chosen.remove_cost.kl) == ("latents", 0.91, 0.01)
    assert chosen.remove_cost.lookalikes == Rate(0.1, *(rate(0.1, 50)[key] for key in ("low", "high")), 50)
    assert [one.method for one in found.rivals if one.on_add_front] == ["latent", "difference_of_means"]
    assert found.rivals[3].add_cost.kl is None
    assert found.base_cost.lookalikes is not None
    assert found.base_cost.lookalikes.rate == 0.3
    assert [len(point.latents) for point in found.sizes] == [0, 1, 2, 3]
    assert found.pairs[0].interaction == Interval(-0.6, -0.65, pytest.approx(-0.55))
    assert (found.hydras[0].latent, found.hydras[0].partner) == (402, 17)
    assert [row.ranked for row in found.candidates] == [True, True, False]
    assert found.agreement["integrated"].rho == 1.0
    assert found.confounds is not None
    assert found.confounds.used.flagged == []
    assert found.confounds.counts == {"find": {"positives": (100, 80), "negatives": (100, 90)}}
    assert found.origin is not None
    assert found.origin.files[0].licence == "CC-BY-4.0"
    assert found.origin.sources[0].dropped == {"safe": 250}
    assert found.judges is not None
    assert found.judges.pairs[0].examples[0].completion == PARTED


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a record that something stands at."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [at, *(place for key, item in inner for place in places(item, (*at, key)))]
        if at
        else [place for key, item in inner for place in places(item, (key,))]
    )


def broken_at(place: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    """The record with something else at one place."""
    record = evidence()
    inner: Any = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    return record


def test_any_place_of_a_record_may_hold_anything() -> None:
    every = places(evidence())
    assert len(every) > 500
    for number, place in enumerate(every):
        junk = (None, "x", -1, float("nan"), [], {}, [None], {"a": {}}, True)[number % 9]
        record = broken_at(place, junk)
        read_evidence(record)
        if number % 97 == 0:
            assert "<h2>Refusal</h2>" in page(read(**record))


def test_the_page_answers_every_question_in_order() -> None:
    text = page(read())
    heads = re.findall(r'<h3 id="behavior-refusal-(\w+)">', text)
    order = ["found", "causes", "costs", "rivals", "redundant", "confounds", "judges", "candidates", "examples"]
    assert heads == order
    assert all(f'href="#behavior-refusal-{name}"' in text for name in order)
    for words in (
        "removes refusal from",
        "Over-refusal".lower(),
        "CC-BY-4.0",
        "Latent 402 does next to nothing alone",
        "170 of 200 prompts were kept",
        "drawn by how often they fire: gradient 1 (p = 0.01), integrated 1 (p = 0.01)",
        "60% of the replies share a content word with their own prompt, 10% with another reply",
        "71 of 3,072 latents pass; with the labels shuffled once, 0 do.",
        "Spearman between dose and logit margin 0.94 (p = 0.0007) over the values that prompts give",
    ):
        assert words in text
    assert "Not measured in this run: random draws on the same prompts." in text


def test_an_older_result_opens_and_says_what_was_not_measured() -> None:
    text = page(read_behavior("refusal", behavior("refusal", 0.06, "x")))
    assert re.findall(r'<h3 id="behavior-refusal-(\w+)">', text) == ["found", "causes", "costs", "examples"]
    missing = re.search(r"Not measured in this run: (.*?)\.</p>", text)
    assert missing is not None
    for words in ("rival methods", "costs by method", "latents in pairs", "agreement of judges", "attribution"):
        assert words in missing[1]


def test_nothing_found_is_said_on_the_tile_and_in_the_section() -> None:
    bare = {"found": False, "n_tested": 3072, "n_significant": 0, "latents": None, "hook_name": None, "ranking": []}
    text = page(read_behavior("refusal", bare | {"null_share": rate(0.0, 50)}))
    assert text.count("Nothing was found: none of 3,072 latents") == 2
    assert "0% of 50" in text
    assert "necessity" not in text.replace("necessity shown", "")


def test_replies_that_judges_part_on_are_closed_and_can_be_left_out() -> None:
    text = page(read())
    assert PARTED in text
    assert PARTED not in re.sub(r'<details class="example">.*?</details>', "", text, flags=re.S)
    redacted = page(read(), redact=True)
    assert PARTED not in redacted
    assert "1 reply on which judges part was left out" in redacted


def test_names_from_anywhere_stay_text() -> None:
    record = evidence()
    record["rivals"][HOSTILE] = record["rivals"]["latent"] | {"detail": HOSTILE}
    record["judges"]["rates"][HOSTILE] = record["judges"]["rates"]["texts"]
    record["n_records"][HOSTILE] = {"positives": 1}
    record["confounds"]["audit"]["rows"][0] |= {"family": HOSTILE, "direction": HOSTILE}
    record["confounds"]["flagged"] = [HOSTILE]
    record["provenance"]["files"][0] |= dict.fromkeys(("name", "location", "licence", "url", "citation"), HOSTILE)
    record["provenance"]["left_out"] = [HOSTILE]
    text = page(read_behavior(HOSTILE, behavior("refusal", 0.06, HOSTILE) | record))
    assert "<script" not in text
    assert "<img" not in text
    assert "https://evil.example/x.png" in text


def test_costs_stand_beside_the_model_by_itself_and_empty_columns_are_gone() -> None:
    away, about = cost_tables(read().evidence)
    assert [column.name for column in away.columns] == [
        "Method",
        "KL",
        "ΔCE",
        "KL, text",
        "ΔCE, text",
        "Look-alikes",
        "Facts",
    ]
    assert [row.cells[0].text for row in away.rows] == [
        "the model by itself",
        "★ chosen latents",
        "first latent",
        "difference of means",
        "difference, everywhere",
    ]
    assert away.rows[0].cells[5].text == "30%"
    assert [cell.text for cell in away.rows[1].cells[1:5]] == ["0.01", "\u22120.005", "0.03", "+0.01"]
    assert len(about.rows) == 4  # what cannot be added costs nothing
    assert cost_tables(read_evidence({})) == []


def test_rivals_say_who_is_on_a_front() -> None:
    found = rivals_table(read().evidence)
    assert found is not None
    assert [row.cells[-1].text for row in found.rows[:3]] == ["remove", "remove, add", "remove, add"]
    assert [row.look for row in found.rows] == ["best", "", "", ""]


def test_confounds_stand_beside_what_balancing_left() -> None:
    view = confounds_view(read().evidence.confounds)
    assert view is not None
    assert (view["flagged"], view["still"]) == (["length"], [])
    assert [cell.text for cell in view["table"].rows[0].cells] == ["length", "0.720", "flagged", "0.550", "longer"]
    assert view["said"] == "Balanced by match on length; 170 of 200 prompts were kept."
    plain = confounds_view(read(confounds=evidence()["confounds"] | {"after": None, "balance": {}}).evidence.confounds)
    assert plain is not None
    assert (plain["still"], plain["said"]) == (None, "")


def test_pairs_are_shown_by_the_size_of_their_interaction() -> None:
    pair = evidence()["interactions"]["pairs"][0]
    many = [
        pair | {"second": n, "interaction": {"estimate": n / 10, "low": n / 10 - 0.2, "high": 9}} for n in range(15)
    ]
    shown = behavior_view(read(interactions={"pairs": many, "hydras": []}), redact=False)["pairs"]
    assert [row.cells[0].text for row in shown.rows[:2]] == ["17, 14", "17, 13"]
    assert (len(shown.rows), shown.hidden) == (MAX_PAIRS, 15 - MAX_PAIRS)
    assert {row.cells[-1].text for row in shown.rows} == {"each needs the other"}


def texts_of(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def points_of(svg: str, look: str) -> list[tuple[float, float]]:
    line = next(
        node
        for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
        if node.get("class") == look
    )
    return [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]


def test_every_method_has_a_dot_and_a_label_and_the_front_only_rises() -> None:
    # All dots but one in a heap: labels beside dots would not fit.
    dots = [Dot(f"method {n}", 0.01 + 1e-5 * n, Rate(0.0), False, False, False) for n in range(12)]
    dots += [Dot("free", 0.0, Rate(0.0), True, False, False), Dot("best", 0.1, Rate(0.8), True, True, True)]
    svg = pareto(dots, "restored")
    assert {dot.label for dot in dots} <= {text.removeprefix("★ ") for text in texts_of(svg)}
    assert "★ best" in texts_of(svg)
    assert svg.count("<circle") + svg.count("<rect") - 3 == len(dots)  # three are the legend's
    front = points_of(svg, "line k0")
    assert [x for x, _ in front] == sorted(x for x, _ in front)
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)
    assert len(front) == 3


def test_a_picture_of_nothing_says_so() -> None:
    for svg in (pareto([Dot("x", None, None, False, False, False)], "restored"), size_curve([]), attributed([])):
        assert "no data to draw" in svg


@given(st.lists(st.floats(0, 500), max_size=20), st.floats(1, 30))
def test_labels_never_touch(places: list[float], gap: float) -> None:
    found = spaced(sorted(places), gap, 0.0, 500.0)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(found))
    assert all(place >= 0 for place in found)
    if len(places) * gap <= 500:
        assert all(place <= 500 + 1e-6 for place in found)


def test_a_label_stays_at_its_dot_where_there_is_room() -> None:
    assert spaced([10.0, 100.0, 200.0], 15, 0, 300) == [10.0, 100.0, 200.0]


def test_sizes_are_drawn_with_what_was_measured() -> None:
    points = [SizePoint([], None, Rate(1.0), Rate(0.0), None), SizePoint([3], None, Rate(0.2), Rate(0.8), None)]
    svg = size_curve(points)
    assert "the behaviour 100%, 20%; a normal reply 0%, 80%" in svg
    assert "broken" not in svg


def test_tables_keep_their_first_column_and_count_what_is_hidden() -> None:
    rows = [Line([text_cell(""), text_cell(""), text_cell("x")])] * 3
    found = table("t", [Column("a"), Column("b"), Column("c")], rows, limit=2)
    assert found is not None
    assert [column.name for column in found.columns] == ["a", "c"]
    assert (len(found.rows), found.hidden) == (2, 1)
    assert table("t", [Column("a")], []) is None
    assert interval_cell(Interval(-0.5, -0.6, 0.004)) == ("\u22120.500", "\u22120.600 to 0.004")


def test_the_terminal_gets_a_table_of_rivals_and_the_outcome() -> None:
    record = behavior("refusal", 0.06, "x") | evidence()
    record["rivals"]["\x1b[31mred" + "x" * 90] = record["rivals"]["latent"]
    text = outcome_text("refusal", record)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert max(map(len, lines)) <= COLUMNS
    assert lines[0].split() == ["method", "AUROC", "restored", "KL", "brought", "about", "KL", "added", "front"]
    for method in rivals():
        assert any(line.split()[:1] == [method] for line in lines)
    assert "removes refusal from" in text
    assert "–" in next(line for line in lines if line.startswith("difference_of_means_everywhere"))  # noqa: RUF001
    older = outcome_text("refusal", behavior("refusal", 0.06, "x"))
    assert older.startswith("Ablating")


def test_tested_latents_are_shown_however_far_down_they_rank() -> None:
    rows = [
        {"latent": n, "hook_name": "blocks.2.hook_resid_post", "d_sae": 1024, "auroc": 0.99 - n / 1000}
        for n in range(90)
    ]
    view = behavior_view(read(ranking=rows, latents=[60, 88], clamp_latents=[3]), redact=False)
    starred = [row.cells[0].text for row in view["ranking"].rows if row.look == "best"]
    assert starred == ["3 ★", "60 ★", "88 ★"]
    assert view["n_hidden"] == 90 - 25 - 2
    labels = [
        text for text in texts_of(view["ranking_plot"]) if (text.startswith("★ ") and text[2:].isdigit()) or "·" in text
    ]
    assert len([text for text in labels if text.startswith("★")]) == 3
    assert len(labels) == 14
