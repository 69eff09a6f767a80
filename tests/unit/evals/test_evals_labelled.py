"""Labelled texts: what is read, what is told apart, and a sentence for each mistake."""

import json

import pytest

from sae.errors import UserError
from sae.evals.labelled import read_labelled


@pytest.fixture
def write(tmp_path):
    def write(records):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def records(labels, n=12, **more):
    return [{"text": f"text {label} {i}", "label": label, **more} for i in range(n) for label in labels]


@pytest.mark.parametrize(
    ("labels", "tasks"),
    [
        ([0, 1], {"1": "1"}),
        ([False, True], {"true": "true"}),
        ([1.0, 2], {"2": "2"}),
        (["bird", "cat", "ant"], {"ant": "ant", "bird": "bird", "cat": "cat"}),
    ],
)
def test_tasks(write, labels, tasks):
    found = read_labelled(write(records(labels)))
    assert {name: name for name in found.tasks()} == tasks
    for name, flags in found.tasks().items():
        assert [label for label, flag in zip(found.labels, flags, strict=True) if flag] == [name] * 12


def test_groups_are_the_texts_where_none_are_given(write):
    plain = read_labelled(write(records("ab")))
    assert plain.groups == plain.texts
    assert not plain.grouped
    named = read_labelled(write(records("ab", group=7)))
    assert set(named.groups) == {"7"}
    assert named.grouped
    part = named.take([3, 1])
    assert (part.texts, part.labels) == (["text b 1", "text b 0"], ["b", "b"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": None}, r"record 3 has no 'text' among its fields \('text', 'label'\): add or rename"),
        ({"label": None}, "record 3 has no 'label'"),
        ({"text": "  "}, "record 3 has text '  ': give words"),
        ({"text": ["a"]}, r"record 3 has text \['a'\]"),
        ({"label": {"a": 1}}, "record 3 has label"),
        ({"group": "g"}, "record 3: some records have a 'group'"),
    ],
)
def test_bad_records(write, change, sentence):
    given = records("ab")
    given[2] = given[2] | change
    with pytest.raises(UserError, match=sentence):
        read_labelled(write(given))


def test_bad_files(write, tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_labelled(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no record"):
        read_labelled(write([]))
    with pytest.raises(UserError, match="only the label 'a'"):
        read_labelled(write(records("a")))
    with pytest.raises(UserError, match="9 rows of label 'b': give 10 or more"):
        read_labelled(write([*records("a"), *records("b", n=9)]))
    with pytest.raises(UserError, match="record 1 is no mapping"):
        read_labelled(write(["text"]))


def test_a_file_of_another_encoding_is_said_to_be_one(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "plain", "label": 1}\n' + '{"text": "caf\u00e9", "label": 0}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 in line 2: save the file as UTF-8"):
        read_labelled(path)
