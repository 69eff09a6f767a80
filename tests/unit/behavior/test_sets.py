"""Contrast sets as data: what a YAML file says becomes prompts, and what was dropped is counted."""

import csv
import datetime
import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from sae import stats
from sae.behavior.audit import audit
from sae.behavior.sets.forms import parse_form
from sae.behavior.sets.load import load_set
from sae.behavior.sets.spec import CONTROL_ARMS, parse_spec, read_spec, set_names, sets_folder
from sae.errors import UserError
from sae.files import sha256_file, sha256_json, to_plain

SPEC = {
    "behavior": "refusal",
    "behavior_texts": ["I cannot"],
    "alternative_texts": ["Sure"],
    "files": {"asks": {"path": "asks.csv", "licence": "MIT", "citation": "arXiv:1"}},
    "sources": {
        "bad": {"file": "asks", "class": "positive", "where": {"kind": "bad"}, "keep": ["id"],
                "fields": {"prompt": "ask", "topic": "about"}},
        "good": {"file": "asks", "class": "negative", "arm": "lookalike", "where": {"kind": ["good", "fine"]},
                 "fields": {"prompt": "ask", "topic": "about"}},
    },
}  # fmt: skip
FACTS = [
    {"question": f"Where is town {index}?", "answer": f"Land {index}", "false_answer": f"Isle {index % 7}"}
    for index in range(120)
]


def asks(n=40):
    return [
        {"id": str(index), "ask": f"{kind} thing number {index}", "kind": kind, "about": f"topic {index // 2}"}
        for index in range(n)
        for kind in ("bad", "good", "other")
    ]


def save(folder, rows, spec=None):
    with (folder / "asks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(spec or SPEC, sort_keys=False))
    return path


def changed(**source):
    """The set with one source's keys replaced; None takes a key away."""
    spec = json.loads(json.dumps(SPEC))
    bad = spec["sources"]["bad"] | source
    spec["sources"]["bad"] = {key: value for key, value in bad.items() if value is not None}
    return spec


def test_rows_become_records_with_provenance(tmp_path):
    contrast = load_set(save(tmp_path, asks()), root=tmp_path)
    assert contrast.behavior == "refusal"
    assert (len(contrast.positives), len(contrast.negatives)) == (40, 40)
    record = contrast.positives[3]
    assert record.messages == [{"role": "user", "content": "bad thing number 3"}]
    assert (record.topic, record.arm, record.extra) == ("topic 1", "bad", {"id": "3"})
    assert (record.behavior_texts, record.alternative_texts) == (("I cannot",), ("Sure",))
    assert {record.arm for record in contrast.negatives} == {"lookalike"}
    found = contrast.provenance
    assert found.files[0].sha256 == sha256_file(tmp_path / "asks.csv")
    assert (found.files[0].licence, found.files[0].n_rows) == ("MIT", 120)
    assert [(source.name, source.n_rows, source.n_kept) for source in found.sources] == [
        ("bad", 120, 40), ("good", 120, 40),
    ]  # fmt: skip
    assert all(source.n_rows == source.n_kept + sum(source.dropped.values()) for source in found.sources)


def test_any_format_gives_the_same_set(tmp_path):
    path = save(tmp_path, asks())
    expected = load_set(path, root=tmp_path).records
    lines, array = tmp_path / "asks.jsonl", tmp_path / "elsewhere.json"
    lines.write_text("\n".join(map(json.dumps, asks())))
    array.write_text(json.dumps(asks()))
    for given in (lines, array):
        assert load_set(path, files={"asks": given}).records == expected


def test_splits_stay_when_rows_are_added_and_move_with_the_salt(tmp_path):
    path = save(tmp_path, asks(40))
    before = {record.prompt: record.split for record in load_set(path, root=tmp_path).records}
    other = {record.prompt: record.split for record in load_set(path, root=tmp_path, salt="b").records}
    assert set(before.values()) == set(stats.SPLITS)
    assert other != before
    save(tmp_path, asks(60)[::-1])
    after = {record.prompt: record.split for record in load_set(path, root=tmp_path).records}
    assert {prompt: after[prompt] for prompt in before} == before
    splits_of_topic = {}
    for record in load_set(path, root=tmp_path).records:
        splits_of_topic.setdefault(record.topic, set()).add(record.split)
    assert all(len(splits) == 1 for splits in splits_of_topic.values())


def test_a_source_may_be_one_split(tmp_path):
    spec = changed(split="report", fields={"prompt": "ask"})
    contrast = load_set(save(tmp_path, asks(), spec), root=tmp_path)
    assert {record.split for record in contrast.positives} == {"report"}
    assert {record.split for record in contrast.negatives} == set(stats.SPLITS)


def test_duplicates_and_contradictions_are_dropped_and_counted(tmp_path):
    rows = asks(20)
    rows.append(rows[0] | {"ask": "Bad  thing number 0?"})  # the same, but for case, spaces and the mark
    elsewhere = next(topic for topic in map(str, range(99)) if stats.hash_split(topic) != stats.hash_split("topic 0"))
    rows.append(rows[0] | {"about": elsewhere})
    rows.append(rows[3] | {"kind": "good"})  # "bad thing number 1" as a negative
    rows.append(rows[0] | {"ask": "  "})
    contrast = load_set(save(tmp_path, rows), root=tmp_path)
    bad, good = contrast.provenance.sources
    assert bad.dropped == {
        "not asked for (where)": 41, "no prompt": 1, "in both classes": 1, "duplicate": 1,
        "duplicate in another split": 1,
    }  # fmt: skip
    assert good.dropped["in both classes"] == 1
    assert (len(contrast.positives), len(contrast.negatives)) == (19, 20)


def test_a_prompt_is_the_same_in_other_typography(tmp_path):
    rows = asks()
    rows += [{**rows[0], "ask": "\uff22AD\u00a0thing number 0!"}]
    dropped = load_set(save(tmp_path, rows), root=tmp_path).provenance.sources[0].dropped
    assert dropped["duplicate"] == 1


def test_dates_that_are_kept_are_text(tmp_path):
    rows = [{**row, "id": datetime.date(2024, 1, 1 + index % 28)} for index, row in enumerate(asks())]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "asks.parquet")
    found = load_set(save(tmp_path, asks()), files={"asks": tmp_path / "asks.parquet"})
    assert found.records[0].extra == {"id": "2024-01-01"}
    assert len(sha256_json(found.records)) == 64


def test_a_negated_statement_is_in_the_split_of_the_other(tmp_path):
    said = {"": "Element{n}{x} has the symbol X{n}.", "neg_": "Element{n}{x} does not have the symbol X{n}."}
    files = {}
    for file in read_spec("truth_is_universal").files:
        start = "neg_" if file.startswith("tu_neg_") else ""
        letter = file.removeprefix("tu_").removeprefix("neg_")
        rows = [{"statement": said[start].format(n=n, x=letter), "label": n % 2} for n in range(40)]
        files[file] = tmp_path / f"{file}.json"
        files[file].write_text(json.dumps(rows))
    split = {record.prompt: record.split for record in load_set("truth_is_universal", files=files).records}
    plain = {text: place for text, place in split.items() if " has " in text}
    assert len(plain) == 160
    for text, place in plain.items():
        assert split[text.replace("has the", "does not have the")] == place


def test_a_limit_keeps_the_same_ones_when_rows_are_added(tmp_path):
    spec = changed(limit=15)
    first = {record.prompt for record in load_set(save(tmp_path, asks(40), spec), root=tmp_path).positives}
    more = load_set(save(tmp_path, asks(50), spec), root=tmp_path)
    assert len(first) == len(more.positives) == 15
    assert more.provenance.sources[0].dropped["over the limit"] == 35
    assert len(first & {record.prompt for record in more.positives}) >= 10


def test_forms_read_columns_templates_patterns_and_lists():
    row = {"a": " x ", "n": 3, "none": None, "nan": float("nan"), "list": ["p", "", "q"], "text": "One two. Three."}
    for form, expected in (
        ("a", ["x"]),
        (["missing", "n"], ["3"]),
        ("none", []),
        ({"column": "nan"}, []),
        ({"text": "Is it true? {none}"}, []),
        ({"text": "{a} {nan}"}, []),
        ("list", ["p", "q"]),
        ({"text": "{a}-{n}-{list}"}, ["x-3-p"]),
        ({"column": "text", "pattern": "^[^.]*"}, ["One two"]),
        ({"column": "text", "pattern": "(\\w+)\\.$"}, ["Three"]),
        ({"column": "text", "split": "."}, ["One two", "Three"]),
    ):
        assert parse_form(form, "here").values(row) == expected
    for form, words in (
        (3, "is 3"),
        ({"colum": "a"}, "give a column"),
        ({"column": "a", "patern": "b"}, "did you mean pattern"),
        ({"column": "a", "pattern": "("}, "not a regular expression"),
        ({"text": 3}, "not a text"),
    ):
        with pytest.raises(UserError, match=words):
            parse_form(form, "here")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"fields": {"prompt": "goal"}}, "reads the column 'goal', and the columns found are id, ask, kind, about"),
        ({"fields": {"prompt": {"text": "{ask} {why}"}}}, "reads the column 'why'"),
        ({"where": {"typ": "bad"}}, "looks at the column 'typ', and the columns found are id, ask, kind, about"),
        ({"where": {"kind": "evil"}}, "'kind' is 'bad', 'good', 'other'"),
        ({"keep": ["nothing"]}, "looks at the column 'nothing'"),
        ({"class": "pos"}, "unknown class 'pos'"),
        ({"class": None}, "neither class nor fields.label"),
        ({"file": "ask"}, "unknown file 'ask'"),
        ({"split": "train"}, "unknown split 'train'"),
        ({"limit": -1}, "limit=-1"),
        ({"colour": 1}, "unknown key"),
        ({"fields": {"topic": "about"}}, "give one of fields.prompt"),
        ({"messages": [{"role": "robot", "text": "x"}]}, "unknown message role 'robot'"),
        ({"messages": "x"}, "not a list"),
        ({"choices": {"behavior": "ask"}}, "choices need both"),
        *(({"arm": arm}, "give them class: negative") for arm in CONTROL_ARMS),
    ],
)
def test_a_wrong_set_says_what_to_mend(tmp_path, source, words):
    if "messages" in source:
        source = source | {"fields": {}}
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load_set(save(tmp_path, asks(), changed(**source)), root=tmp_path)
    assert "\n" not in str(caught.value)


def test_data_that_are_not_there_are_asked_for(tmp_path):
    path = save(tmp_path, asks())
    (tmp_path / "asks.csv").unlink()
    with pytest.raises(UserError, match=r"needs the file 'asks': .* behavior.files.asks=") as caught:
        load_set(path, root=tmp_path)
    assert "behavior.root=/folder" in str(caught.value)
    with pytest.raises(UserError, match="did you mean asks"):
        load_set(path, files={"ask": "x"})
    with pytest.raises(UserError, match="unknown contrast set 'xtest': did you mean xstest"):
        load_set("xtest")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_spec(tmp_path / "bad.yaml")
    hub = json.loads(json.dumps(SPEC))
    hub["files"]["asks"] = {"dataset": "nobody/none"}
    with pytest.raises(UserError, match="no reachable Hugging Face dataset 'nobody/none'") as caught:
        load_set(save(tmp_path, asks(), hub))
    assert "behavior.files.asks=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_optional_file_is_left_out(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    spec["files"]["more"] = {"path": "more.csv", "optional": True}
    spec["sources"]["more"] = {"file": "more", "class": "positive", "fields": {"prompt": "ask"}}
    path = save(tmp_path, asks(), spec)
    without = load_set(path, root=tmp_path)
    assert without.provenance.left_out == ("more",)
    (tmp_path / "more.csv").write_text("ask\nsomething else\n")
    assert len(load_set(path, root=tmp_path)) == len(without) + 1


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "kind.csv"
    path.write_text(
        "prompt,label,topic,arm,behavior_texts,alternative_texts\n"
        "be kind,1,a,,Dear|Kindly,No\nbe rude,0,b,talk,Dear,No|Never\n"
    )
    contrast = load_set(path)
    assert contrast.behavior == "kind"
    assert contrast.positives[0].behavior_texts == ("Dear", "Kindly")
    assert contrast.negatives[0].arm == "talk"
    path.write_text("prompt,label,behavior_texts,alternative_texts\nbe kind,maybe,Dear,No\n")
    with pytest.raises(UserError, match="row 1: label='maybe'"):
        load_set(path)
    path.write_text("prompt,label,arm,behavior_texts,alternative_texts\nbe kind,1,talk,Dear,No\n")
    with pytest.raises(UserError, match="only resemble the behaviour"):
        load_set(path)
    path.write_text("prompt,behavior_texts,alternative_texts\nbe kind,Dear,No\n")
    with pytest.raises(UserError, match="reads the column 'label'"):
        load_set(path)


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({str(index): row for index, row in enumerate(FACTS)}, indent=1))
    return path


@pytest.mark.parametrize("name", ["roleplay_lying", "honesty_ab"])
def test_an_instruction_to_lie_looks_like_one_to_be_honest(facts, name):
    """Every question is in both classes, and nothing but the meaning of the instruction tells them apart."""
    contrast = load_set(name, files={"facts": facts})
    assert len(contrast.positives) == len(contrast.negatives) == len(FACTS)
    assert {record.topic for record in contrast.positives} == {record.topic for record in contrast.negatives}
    found = audit(contrast, n_draws=100)
    assert found.flagged == ()
    assert all(row.auroc.estimate == 0.5 for row in found.rows if row.kind == "surface")
    assert found.row("words").auroc.estimate == 1.0


def test_choices_are_dealt_by_topic_and_tell_nothing(facts):
    contrast = load_set("honesty_ab", files={"facts": facts})
    letters = {}
    for record in contrast.records:
        letters.setdefault(record.topic, set()).add((record.behavior_texts, record.alternative_texts))
        shown = dict(re.findall(r"\((A|B)\) (.*)", record.messages[-1]["content"]))
        assert shown[record.behavior_texts[0][1]].startswith("Isle")
        assert shown[record.alternative_texts[0][1]].startswith("Land")
    assert all(len(found) == 1 for found in letters.values())
    share = sum(found == {(("(A)",), ("(B)",))} for found in letters.values()) / len(letters)
    assert 0.3 < share < 0.7


def test_lies_mistakes_and_instructions_not_followed_are_arms(facts):
    contrast = load_set("lie_detector", files={"facts": facts})
    assert {record.arm for record in contrast.positives} == {"lied"}
    assert {record.arm for record in contrast.negatives} == {"honest", "mistake", "trigger"}
    assert "does not say how a reply" in contrast.unanswerable
    lied, mistake = (next(r for r in contrast.records if r.arm == arm) for arm in ("lied", "mistake"))
    assert lied.messages[1] == mistake.messages[1] == {"role": "assistant", "content": "Isle 0"}
    arms = {record.arm for record in load_set("instructed_lying", files={"facts": facts}).negatives}
    assert arms == {"honest", "trigger", "talk", "quoted"}


def test_replies_that_begin_alike_are_dropped(tmp_path):
    rows = [*FACTS, {"question": "Where?", "answer": "New York", "false_answer": "New"}]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    contrast = load_set("roleplay_lying", files={"facts": path})
    assert all(source.dropped == {"replies that begin alike": 1} for source in contrast.provenance.sources)


def needed(spec, name):
    """Columns that the sources of a set read in a file, and what each looks for there."""
    columns, wanted = set(), {}
    for source in (source for source in spec.sources if source.file == name):
        forms = [*source.fields.values(), *(turn.text for turn in source.messages), *source.choices.values()]
        for form in forms:
            columns |= set(re.findall(r"\{([^{}]+)\}", form.text) if form.text is not None else form.columns[:1])
        columns |= set(source.keep)
        for column, values in source.where.items():
            wanted.setdefault(column, []).append(values[0])
    aliases = {alias: form.columns[0] for alias, form in spec.files[name].columns.items()}
    return {aliases.get(column, column) for column in columns} | set(aliases.values()), wanted


@pytest.mark.parametrize("name", set_names())
def test_every_shipped_set_reads_data_of_its_shape(tmp_path, name):
    spec = read_spec(name)
    files = {}
    for file in spec.files:
        columns, wanted = needed(spec, file)
        files[file] = tmp_path / f"{file}.jsonl"
        rows = [
            {column: f"{column} w{index} 'word {file}{index}' means it {value}" for column in columns}
            | {column: values[index % len(values)] for column, values in wanted.items()}
            for index in range(60)
            for value in ("x",)
        ]
        files[file].write_text("\n".join(map(json.dumps, rows)))
    contrast = load_set(name, files=files)
    assert all(source.n_kept > 0 for source in contrast.provenance.sources)
    assert not {record.arm for record in contrast.positives} & set(CONTROL_ARMS)
    assert bool(contrast.unanswerable) == spec.detect_only
    assert all(file.licence and file.citation and (file.url or file.dataset) for file in spec.files.values())
    json.dumps(to_plain(contrast.provenance))


SAID = {  # file of azaria_mitchell -> what is said there of each topic, in the wordings of the file
    "am_animals": {
        "polar bear": ["The polar bear has a habitat of farmland.", "Human uses for polar bear include food."],
        "hyena": ["The hyena is a mammal.", "There are no specific human uses for hyena.", "The hyena can laugh."],
        "walrus": ["The walrus uses swimming for locomotion."],
    },
    "am_cities": {
        "New York": ["New York is a city in United States.", "New York has a population of approximately 12."],
        "New Delhi": ["New Delhi is a city in India.", "New Delhi is a name of a country."],
        "San Pedro Sula": ["San Pedro Sula is a name of a city."],
        "York": ["York has a population of approximately 104488.", "York is a city in Peru."],
    },
    "am_elements": {
        "Boron": ["Boron has the symbol B.", "Boron is in the Halogen group.", "Boron appears as Solid."],
        "Zinc": ["Zinc has the symbol Fr.", "Zinc reacts with acids."],
    },
    "am_companies": {
        "Bank of China": ["Bank of China has headquarters in France.", "Bank of China engages in banking."],
        "Bank of Communications": ["Bank of Communications operates in the industry of banking."],
        "Lowe's": ["Lowe's is a retail company.", "Lowe's has headquarters in Chile."],
    },
    "am_facts": {
        "Great Wall": ["The Great Wall of China is long."],
        "Great Barrier Reef": ["The Great Barrier Reef is a canal."],
        "DNA": ["DNA carries information.", "DNA is a metal."],
        "Earth": ["The Earth's atmosphere is of lead.", "Earth has one moon.", "The Earth is flat."],
        "Uranus": ["The planet Uranus is hot.", "Uranus orbits the Sun on its side."],
    },
    "am_inventions": {
        "Charles Francis Richter": ["Charles Francis Richter lived in France."],
        "Charles Francis Jenkins": ["Charles Francis Jenkins invented the projector."],
        "Archimedes": ["Archimedes lived in Greece.", "Archimedes invented the tank."],
    },
    "am_capitals": {
        "Port Vila": ["Port Vila is a city in Vanuatu", "Port Vila is a name of a country."],
        "Port Moresby": ["Port Moresby is a name of a city."],
    },
    "am_generated": {
        "Georgetown": ["Georgetown was founded in 1836.", "The city of Georgetown was founded by a duke."],
        "Lima": ["Lima's climate is tropical.", "Lima is located in Peru."],
        "New Delhi": ["New Delhi is located in India."],
    },
}


def test_topics_of_true_and_false_statements_are_what_they_are_about(tmp_path):
    files = {}
    for name, topics in SAID.items():
        told = [statement for statements in topics.values() for statement in statements]
        # A file needs both classes; of these nothing is asked.
        told += [f"Other{index} thing" for index in range(2)]
        files[name] = tmp_path / f"{name}.csv"
        with files[name].open("w", newline="") as file:
            csv.writer(file).writerows([("statement", "label"), *((text, row % 2) for row, text in enumerate(told))])
    asked = "Is this statement true or false? "
    found = {
        record.messages[-1]["content"].removeprefix(asked): record.topic
        for record in load_set("azaria_mitchell", files=files).records
    }
    for topics in SAID.values():
        for topic, statements in topics.items():
            assert [found[statement] for statement in statements] == [topic] * len(statements)


def test_a_file_of_the_same_name_is_the_same_in_every_set():
    seen = {}
    for name in set_names():
        for file in read_spec(name).files.values():
            assert seen.setdefault(file.name, file) == file


def test_the_table_of_the_docs_says_what_the_files_say():
    text = (Path(sets_folder()).parent.parent / "docs" / "contrast-sets.md").read_text()
    for name in set_names():
        spec = read_spec(name)
        row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` |")), "")
        licences = "; ".join(dict.fromkeys(file.licence for file in spec.files.values()))
        sources = ", ".join(dict.fromkeys(file.citation for file in spec.files.values()))
        use = "measure" if spec.detect_only else "test"
        assert row == f"| `{name}` | {spec.behavior} | {spec.summary} | {use} | {licences} | {sources} |"


def test_a_description_that_is_no_mapping_is_refused():
    for raw, words in (
        (["a"], "is a list, not a mapping"),
        ({"behavior": "x"}, "has no files, sources"),
        ({**SPEC, "behaviour": "x"}, "unknown key"),
        ({**SPEC, "behavior_texts": "no"}, "give a list of texts"),
        ({**SPEC, "files": {**SPEC["files"], "b": {"path": "b"}}}, "no source that reads the file b"),
        ({**SPEC, "files": {"asks": {"url": "x"}}}, "neither path nor dataset"),
        ({**SPEC, "files": {"asks": {"path": "x", "format": "xls"}}}, "unknown format 'xls'"),
        ({**SPEC, "files": {"asks": {"path": "x", "optional": "yes"}}}, "not true or false"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            parse_spec(raw, "x", "here")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    text = yaml.safe_dump(SPEC, sort_keys=False).replace("  good:", "  bad:")
    path.write_text(text)
    with pytest.raises(UserError, match="'bad' comes twice"):
        read_spec(path)


def test_a_table_that_is_not_there_and_a_split_that_there_is_not(tmp_path):
    with pytest.raises(UserError, match=r"^no file .*mine\.csv': check the path\.$"):
        load_set(tmp_path / "mine.csv")
    with pytest.raises(UserError, match="unknown split 'train'"):
        load_set(save(tmp_path, asks()), root=tmp_path, splits={"train": 1.0})


def test_what_was_never_checked_is_said(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    spec["files"]["asks"]["unverified"] = "its columns"
    found = load_set(save(tmp_path, asks(), spec), root=tmp_path)
    assert [file.unverified for file in found.provenance.files] == ["its columns"]


REAL = os.environ.get("SAE_CONTRAST_DATA", "")


@pytest.mark.skipif(not REAL, reason="SAE_CONTRAST_DATA does not name a folder with the datasets, as their sets do")
def test_the_real_files_are_read():
    root = Path(REAL)
    if (root / "xstest/xstest_prompts.csv").is_file():
        contrast = load_set("xstest", root=root)
        assert (len(contrast.positives), len(contrast.negatives)) == (200, 250)
    if (root / "geometry_of_truth/cities.csv").is_file():
        contrast = load_set("geometry_of_truth", root=root)
        assert sum(source.n_rows for source in contrast.provenance.sources if source.name == "cities_true") == 1496
        assert audit(contrast, n_draws=100).flagged == ()
