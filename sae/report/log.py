"""Where metrics go: JSON lines in the run folder always, and wandb when asked. The only file that imports
wandb.

    with open_sink(folder, wandb_mode="offline", project="sae", name="demo", config=config) as sink:
        sink.log({"k16/fvu": 0.21}, step=100)

The JSON lines are the record that other programs read; wandb is a view of them. So once a run has started,
a fault of wandb (network, disk, service) is reported once and never stops the work. At the start it does
stop it: a run that was asked to be online and is not would be noticed too late.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sae.errors import UserError, unknown
from sae.files import append_jsonl, read_json, to_plain, write_json, write_text

MODES = ["online", "offline", "off"]
TABLE_LIMIT = 10_000  # wandb silently keeps this many rows of a logged table
_BIN_LIMIT = 512  # of a wandb histogram
_REMEDY = "run `wandb login`, or set log.wandb=offline (synced later with `wandb sync`) or log.wandb=off."


class Sink:
    """Writes metrics as JSON lines into a folder; subclasses send them elsewhere too."""

    def __init__(self, folder: Path | str, *, resume_step: int | None = None) -> None:
        """Prepare `metrics.jsonl`.

        Args:
            folder: where to write.
            resume_step: the first step that will be logged again, for a run that continues: records of this
                step and later are dropped, so that a crash leaves no step twice. None starts an empty file.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._summary: dict[str, Any] = {}
        write_text(self.path, "".join(_kept_lines(self.path, resume_step)))
        if resume_step is not None and (self.folder / "summary.json").is_file():
            self._summary = dict(read_json(self.folder / "summary.json"))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record scalars at a step. NaN and infinities become null."""
        append_jsonl(self.path, {"step": int(step), "time": time.time(), **_scalars(values)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table, whole, as `tables/<name>.json`."""
        write_json(self.table_path(name), {"columns": list(columns), "rows": [list(row) for row in rows]})

    def table_path(self, name: str) -> Path:
        """Return the file of a table."""
        return self.folder / "tables" / f"{_safe_name(name)}.json"

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Record a ready-made histogram: `len(edges)` is `len(counts) + 1`; counts that are NaN become 0."""
        clean = [count if math.isfinite(count) else 0.0 for count in map(float, counts)]
        record = {"counts": clean, "edges": [float(edge) for edge in edges]}
        append_jsonl(self.path, {"step": int(step), "time": time.time(), name: record})

    def html(self, name: str, path: Path | str) -> None:
        """Record an HTML page that was written to disk; the JSON lines need nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values in `summary.json`; later calls add to earlier ones."""
        self._summary.update(to_plain(dict(values)))
        write_json(self.folder / "summary.json", self._summary)

    def close(self) -> None:
        """Finish; further calls do nothing."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whether the work succeeded or not."""
        self.close()


class NullSink(Sink):
    """Writes nothing: for every process but the first of a distributed run."""

    def __init__(self) -> None:
        """Touch no file."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Do nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing."""

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""


class WandbSink(Sink):
    """Writes JSON lines and sends the same to a wandb run."""

    def __init__(
        self,
        folder: Path | str,
        *,
        mode: str,
        project: str,
        name: str,
        config: Mapping[str, Any],
        group: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        """Start the wandb run inside the folder.

        Raises:
            UserError: wandb cannot start; the sentence says what to do.
        """
        super().__init__(folder, resume_step=resume_step)
        self._warned: set[str] = set()
        self._group = group
        self._data_dir_was = os.environ.get("WANDB_DATA_DIR")
        # wandb stages copies of logged files in a user-wide folder unless told otherwise.
        os.environ["WANDB_DATA_DIR"] = str(self.folder.resolve() / "wandb")
        try:
            import wandb

            self._wandb = wandb
            self._run: Any = self._start(mode, project, name, dict(config), resume_step)
        except Exception as error:
            self._restore_environment()
            raise UserError(f"wandb cannot start in mode {mode!r} ({_one_line(error)}): {_REMEDY}") from error

    def _start(self, mode: Any, project: str, name: str, config: dict[str, Any], resume_step: int | None) -> Any:
        """Open the run: a continued online run keeps its identity (offline runs cannot be continued)."""
        note = self.folder / "wandb_run.json"
        run_id = None
        if mode == "online" and resume_step is not None and note.is_file():
            run_id = str(read_json(note).get("id") or "") or None
        run = self._wandb.init(
            mode=mode,
            project=project,
            name=name,
            group=self._group,
            config=to_plain(config),
            dir=str(self.folder.resolve()),
            id=run_id,
            resume="allow" if run_id else None,
            reinit="create_new",
            settings=self._wandb.Settings(
                console="off",
                quiet=True,
                silent=mode == "offline",
                save_code=False,
                table_raise_on_max_row_limit_exceeded=True,
            ),
        )
        # Our own step axis: wandb's internal one may only grow, which a resumed run breaks.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        write_json(note, {"id": run.id, "mode": mode, "project": project, "url": run.url})
        return run

    @property
    def url(self) -> str | None:
        """The run's page, or None offline."""
        return getattr(self._run, "url", None)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record scalars at a step."""
        super().log(values, step)
        ready = {key: value for key, value in _scalars(values).items() if value is not None}
        self._send("log", lambda: self._run.log({**ready, "step": int(step)}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table; wandb gets its first 10,000 rows."""
        super().table(name, columns, rows)
        if len(rows) > TABLE_LIMIT:
            where = self.table_path(name)
            _say(f"table {name!r} has {len(rows):,} rows: wandb gets the first {TABLE_LIMIT:,}, {where} has all.")
        ready = [[_table_cell(value) for value in row] for row in rows[:TABLE_LIMIT]]
        # Mixed columns are common here (a rate or nothing), so per-column types are not enforced.
        self._send(
            "table",
            lambda: self._run.log({name: self._wandb.Table(columns=list(columns), data=ready, allow_mixed_types=True)}),
        )

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Record a ready-made histogram."""
        super().histogram(name, counts, edges, step)
        ready = _wandb_bins(counts, edges)
        if ready is None:
            _say(f"histogram {name!r} at step {step} has no finite bins: it is not sent to wandb.")
            return
        self._send(
            "histogram",
            lambda: self._run.log({name: self._wandb.Histogram(np_histogram=ready), "step": int(step)}),
        )

    def html(self, name: str, path: Path | str) -> None:
        """Show an HTML page in wandb."""
        # inject=True would add a link to a style sheet on wandb's server.
        self._send(
            "html",
            lambda: self._run.log({name: self._wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False)}),
        )

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values."""
        super().summary(values)
        self._send("summary", lambda: self._run.summary.update(to_plain(dict(values))))

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            run, self._run = self._run, None
            self._send("finish", run.finish)
            self._restore_environment()

    def _send(self, kind: str, action: Callable[[], object]) -> None:
        """Talk to wandb; a fault is reported once per kind and otherwise ignored."""
        try:
            action()
        except Exception as error:
            if kind not in self._warned:
                self._warned.add(kind)
                _say(f"wandb {kind} failed ({_one_line(error)}): the run goes on, {self.path} has the metrics.")

    def _restore_environment(self) -> None:
        """Put WANDB_DATA_DIR back, so that the next run of a sweep gets its own."""
        if self._data_dir_was is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        else:
            os.environ["WANDB_DATA_DIR"] = self._data_dir_was


def open_sink(
    folder: Path | str,
    *,
    wandb_mode: str,
    project: str = "sae",
    name: str,
    config: Mapping[str, Any],
    group: str | None = None,
    resume_step: int | None = None,
) -> Sink:
    """Open the metric sink of a stage.

    Args:
        folder: where `metrics.jsonl` goes (and wandb's own files).
        wandb_mode: `online`, `offline` or `off`.
        project: the wandb project.
        name: the run's name in wandb.
        config: what wandb stores as the run's configuration.
        group: what wandb shows this run together with.
        resume_step: for a run that continues, the first step that will be logged again; None starts afresh.

    Raises:
        UserError: the mode is unknown, or wandb cannot start.
    """
    mode = str(getattr(wandb_mode, "value", wandb_mode))
    if mode not in MODES:
        raise unknown("log.wandb mode", mode, MODES)
    if mode == "off":
        return Sink(folder, resume_step=resume_step)
    return WandbSink(folder, mode=mode, project=project, name=name, config=config, group=group, resume_step=resume_step)


def _kept_lines(path: Path, resume_step: int | None) -> Iterator[str]:
    """Yield the lines of an earlier run that stay: whole ones before the resumed step."""
    if resume_step is None or not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                step = record.get("step") if isinstance(record, dict) else None
                if isinstance(step, int | float) and step < resume_step:
                    yield line if line.endswith("\n") else line + "\n"


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tensors and arrays of one element into numbers; `step` and `time` are the sink's own."""
    ready = {}
    for key, value in values.items():
        if key not in ("step", "time"):
            item = getattr(value, "item", None)
            ready[key] = to_plain(item() if item is not None and getattr(value, "size", None) is not None else value)
    return ready


def _table_cell(value: Any) -> Any:
    """Return what a wandb table takes: a scalar, or JSON text for anything nested."""
    value = to_plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _wandb_bins(counts: Sequence[float], edges: Sequence[float]) -> tuple[list[float], list[float]] | None:
    """Return counts and edges that wandb accepts, or None where there is nothing finite."""
    bins = [float(count) if math.isfinite(count) else 0.0 for count in counts]
    ends = [float(edge) for edge in edges]
    if not bins or len(ends) != len(bins) + 1 or not all(map(math.isfinite, ends)):
        return None
    while len(bins) > _BIN_LIMIT:
        # Merge neighbours; an odd last bin is merged with an empty one of no width.
        if len(bins) % 2:
            bins.append(0.0)
            ends.append(ends[-1])
        bins = [first + second for first, second in zip(bins[::2], bins[1::2], strict=True)]
        ends = ends[::2]
    return bins, ends


def _safe_name(name: str) -> str:
    """Return a table's name as a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "table"


def _one_line(error: BaseException) -> str:
    """Return an error's first line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _say(sentence: str) -> None:
    """Tell the person at the terminal."""
    print(f"note: {sentence}", file=sys.stderr)
