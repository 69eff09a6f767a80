"""Metrics always reach the JSON lines; wandb is a view that never stops the work."""

import json
import math
import os
import socket
from pathlib import Path

import pytest
import torch

from sae.errors import UserError
from sae.files import read_jsonl
from sae.report import log
from sae.report.log import NullSink, WandbSink, open_sink


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine (wandb talks to its own service locally)."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"network use: {address}")
        real(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_off_writes_json_lines(tmp_path: Path) -> None:
    with open_sink(tmp_path, wandb_mode="off", name="r", config={}) as sink:
        sink.log({"k/fvu": torch.tensor(0.25), "bad": math.nan, "step": 99}, step=1)
        sink.histogram("density", [1, math.nan], [-2, -1, 0], step=1)
        sink.table("../latents", ["a", "b"], [[1, "x"], [None, [1.0, "y"]]])
        sink.summary({"fvu": 0.2})
        sink.summary({"inf": math.inf})
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records[0] == {"step": 1, "time": records[0]["time"], "k/fvu": 0.25, "bad": None}
    assert records[1]["density"] == {"counts": [1, 0], "edges": [-2, -1, 0]}
    assert json.loads((tmp_path / "tables/latents.json").read_text())["rows"][1] == [None, [1.0, "y"]]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"fvu": 0.2, "inf": None}


def test_resume_drops_steps_that_come_again_and_a_torn_line(tmp_path: Path) -> None:
    with open_sink(tmp_path, wandb_mode="off", name="r", config={}) as sink:
        for step in range(6):
            sink.log({"x": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    with open_sink(tmp_path, wandb_mode="off", name="r", config={}, resume_step=4) as sink:
        assert steps(tmp_path) == [0, 1, 2, 3]
        sink.log({"x": 40}, 4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    open_sink(tmp_path, wandb_mode="off", name="r", config={})
    assert steps(tmp_path) == []


def test_unknown_mode_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean offline"):
        open_sink(tmp_path, wandb_mode="ofline", name="r", config={})


def test_null_sink_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with NullSink() as sink:
        sink.log({"x": 1}, 0)
        sink.table("t", ["a"], [[1]])
        sink.histogram("h", [1], [0, 1], 0)
        sink.html("page", "absent.html")
        sink.summary({"x": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_network")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(log, "TABLE_LIMIT", 50)
    page = tmp_path / "page.html"
    page.write_text("<p>hello</p>")
    with open_sink(tmp_path / "run", wandb_mode="offline", project="p", name="r", config={"a": Path("b")}) as sink:
        assert isinstance(sink, WandbSink)
        assert sink.url is None
        sink.log({"loss": 1.0, "nan": math.nan}, step=0)
        sink.log({"loss": 0.5}, step=10)
        sink.histogram("density", [1.0, math.nan, 3.0], [-3, -2, -1, 0], step=10)
        sink.histogram("wide", [1.0] * 2001, list(range(2002)), step=10)
        sink.histogram("broken", [1.0], [math.nan, 1.0], step=10)
        sink.table("latents", ["id", "text", "more"], [[i, "t" if i % 2 else None, [i, "x"]] for i in range(60)])
        sink.html("report", page)
        sink.summary({"fvu": 0.1})
        sink.close()
    told = capfd.readouterr().err
    assert "wandb gets the first 50" in told
    assert "no finite bins" in told
    assert " failed " not in told
    assert steps(tmp_path / "run") == [0, 10, 10, 10, 10]
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    assert list((tmp_path / "run/wandb").rglob("*.html"))
    assert "WANDB_DATA_DIR" not in os.environ


def test_wandb_online_without_a_key_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="wandb login"):
        open_sink(tmp_path / "run", wandb_mode="online", name="r", config={})


def test_wandb_faults_are_told_once_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        url = None

        def log(self, values: object) -> None:
            raise RuntimeError("disk full\nmore")

        finish = define_metric = log

    sink = WandbSink.__new__(WandbSink)
    log.Sink.__init__(sink, tmp_path)
    sink._warned, sink._run, sink._data_dir_was = set(), Broken(), None
    for step in range(3):
        sink.log({"x": 1.0}, step)
    sink.close()
    told = capsys.readouterr().err
    assert told.count("wandb log failed (disk full)") == 1
    assert steps(tmp_path) == [0, 1, 2]
