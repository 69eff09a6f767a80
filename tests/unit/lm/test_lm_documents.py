"""Reading documents from files."""

import json

import pytest

from sae.errors import UserError
from sae.lm.documents import Document, read_documents

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def texts(path, **options):
    return [document.text for document in read_documents(path, **options)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    assert texts(write(path, "one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n")) == ["one\n\nstill one", "two"]
    assert texts(write(path, "one\nmore\n\n\ntwo\n")) == ["one\nmore", "two"]
    assert texts(write(path, "one\ntwo")) == ["one\ntwo"]
    assert texts(write(path, "a\n\nb\n\nc"), limit=2) == ["a", "b"]


def test_records(tmp_path):
    lines = [{"text": "one"}, {"messages": CHAT}, {"conversations": [{"from": "human", "value": "hi"}]}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    expected = [Document("one"), Document(messages=CHAT), Document(messages=CHAT[:1])]
    assert list(read_documents(path)) == expected
    assert list(read_documents(write(tmp_path / "b.json", json.dumps(lines, indent=1)))) == expected
    assert texts(write(tmp_path / "c.jsonl", '{"story": "x"}'), text_field="story") == ["x"]


def test_parquet_and_folders(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), tmp_path / "b.parquet")
    write(tmp_path / "a.txt", "t")
    write(tmp_path / "README.md", "no")
    assert texts(tmp_path / "b.parquet") == ["p", "q"]
    assert texts(tmp_path) == ["t", "p", "q"]


def test_bad_input(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    for source, options, words in (
        (tmp_path / "none.txt", {}, "no data file"),
        ("/no/such/folder", {}, "no data file"),
        (tmp_path / "empty", {}, "holds no .txt"),
        (tmp_path / "latin.txt", {}, "not UTF-8"),
        (write(tmp_path / "void.txt", "\n\n"), {}, "holds no documents"),
        (write(tmp_path / "field.jsonl", '{"story": "x", "id": 3}'), {}, "fields story, id: set text_field"),
        (write(tmp_path / "bad.jsonl", '{"text": "x"}\n{oops'), {}, "record 2 is not valid JSON"),
        (write(tmp_path / "turn.jsonl", '{"messages": [{"role": "user"}]}'), {}, "without role and content"),
        (write(tmp_path / "number.jsonl", "3"), {}, "is a int"),
        (tmp_path / "cut.parquet", {}, "not a parquet file"),
        (write(tmp_path / "a.csv", "x"), {}, "ends in none of"),
        (tmp_path / "latin.txt", {"kind": "txt"}, "unknown data kind 'txt'"),
        ("nobody/no-such-dataset", {}, "reachable Hugging Face dataset 'nobody/no-such-dataset'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            list(read_documents(source, **options))
        assert "\n" not in str(caught.value)
