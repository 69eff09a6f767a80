"""Reading documents: text, JSON lines, parquet, folders of those, and Hugging Face datasets, as one stream.

A document is a plain text or a chat. Files are read as a stream and never run code. In a `.txt` file documents are
separated by lines that say `<|endoftext|>`; a file without such a line is split at blank lines, and one without
blank lines is a single document.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sae.errors import UserError, unknown

SEPARATOR = "<|endoftext|>"
KINDS = ["auto", "text", "jsonl", "parquet", "folder", "dataset"]
_SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
#: Where records keep a chat, in order of preference.
_CHAT_FIELDS = ("messages", "conversations", "conversation")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Document:
    """One document: exactly one of `text` and `messages` (`{"role", "content"}` records) is set."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None


def read_documents(
    path_or_name: str | Path,
    *,
    kind: str = "auto",
    text_field: str = "text",
    split: str = "train",
    streaming: bool = True,
    limit: int | None = None,
) -> Iterator[Document]:
    """Read documents as a stream. The path and the kind are checked at once, contents as they are read.

    Args:
        path_or_name: a `.txt`, `.jsonl`, `.json` or `.parquet` file, a folder of those (read in name order), or the
            name of a Hugging Face dataset ("owner/name" or "owner/name:config").
        kind: "auto" goes by the path; or one of `KINDS`.
        text_field: field of a record that holds the text. Records with a field "messages" or "conversations" and
            no such field are chats.
        split: split of a Hugging Face dataset.
        streaming: fetch a Hugging Face dataset piece by piece instead of downloading it first.
        limit: stop after so many documents.

    Raises:
        UserError: missing file, unknown dataset or kind, empty or non-UTF-8 file, a record without the field.
    """
    if kind not in KINDS:
        raise unknown("data kind", kind, KINDS)
    name = str(path_or_name)
    path = Path(name).expanduser()
    if kind == "auto":
        kind = _detect(path, name)
    if kind != "dataset" and not path.exists():
        raise UserError(f"no data file or folder {name!r}: check the path.")
    if kind == "dataset":
        documents = _read_dataset(name, text_field, split, streaming)
    elif kind == "folder":
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise UserError(f"folder {name!r} holds no {', '.join(_SUFFIXES)} file: check the path.")
        documents = chain.from_iterable(_read_file(file, _SUFFIXES[file.suffix], text_field) for file in files)
    else:
        documents = _read_file(path, kind, text_field)
    return _not_empty(documents if limit is None else islice(documents, limit), name)


def _detect(path: Path, name: str) -> str:
    if path.is_dir():
        return "folder"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if path.exists():
        raise UserError(f"{name!r} ends in none of {', '.join(_SUFFIXES)}: rename it, or give kind=.")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"no data file or folder {name!r}: check the path.")
    return "dataset"


def _not_empty(documents: Iterator[Document], name: str) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise UserError(f"{name!r} holds no documents: give a file or dataset with text in it.")
    yield first
    yield from documents


def _read_file(path: Path, kind: str, text_field: str) -> Iterator[Document]:
    if kind == "text":
        return _read_text(path)
    if kind == "jsonl":
        return _records_to_documents(_read_json_records(path), text_field, str(path))
    return _records_to_documents(_read_parquet_records(path), text_field, str(path))


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise UserError(f"{str(path)!r} is not UTF-8 text ({error.reason}): convert it to UTF-8.") from None


def _read_text(path: Path) -> Iterator[Document]:
    separated = any(line.strip() == SEPARATOR for line in _lines(path))
    part: list[str] = []
    for line in chain(_lines(path), [SEPARATOR if separated else ""]):
        if line.strip() == (SEPARATOR if separated else ""):
            text = "".join(part).strip("\n")
            if text.strip():
                yield Document(text=text)
            part = []
        else:
            part.append(line)


def _read_json_records(path: Path) -> Iterator[Any]:
    """Records of a JSON-lines file, or of a JSON file that is one array."""
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            yield from json.loads("".join(chain([first], lines)))
        except json.JSONDecodeError as error:
            raise UserError(f"{str(path)!r} is not valid JSON ({error.msg}): mend it.") from None
        return
    for number, line in enumerate(chain([first], lines), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{str(path)!r}, record {number} is not valid JSON ({error.msg}): give one record a line."
                ) from None
            yield record


def _read_parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for part in file.iter_batches(batch_size=1024):
                yield from part.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{str(path)!r} is truncated or not a parquet file ({reason}): fetch it again.") from None


def _read_dataset(name: str, text_field: str, split: str, streaming: bool) -> Iterator[Document]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds: connection, not found, gated, bad split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no data file, folder or reachable Hugging Face dataset {name!r} with split {split!r} ({reason}): "
            "check the spelling and the network, or give a local path."
        ) from None
    return _records_to_documents(iter(rows), text_field, name)


def _records_to_documents(records: Iterable[Any], text_field: str, source: str) -> Iterator[Document]:
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            yield Document(text=record)
            continue
        if not isinstance(record, dict):
            raise UserError(f"{source!r}, record {number} is a {type(record).__name__}: give records with fields.")
        value = record.get(text_field)
        if isinstance(value, str):
            yield Document(text=value)
            continue
        chat = (
            value
            if isinstance(value, list)
            else next((record[f] for f in _CHAT_FIELDS if record.get(f) and isinstance(record[f], list)), None)
        )
        if chat is None:
            raise UserError(
                f"{source!r}, record {number} has no text in field {text_field!r} but the fields "
                f"{', '.join(map(str, record)) or 'none'}: set text_field to one of them."
            )
        yield Document(messages=[_message(turn, source, number) for turn in chat])


def _message(turn: Any, source: str, number: int) -> dict[str, Any]:
    """One chat turn, from `{"role", "content"}` or ShareGPT's `{"from", "value"}`."""
    turn = turn if isinstance(turn, dict) else {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"{source!r}, record {number} has a message without role and content: give "
            '{"role": "user", "content": "..."} for each.'
        )
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}
