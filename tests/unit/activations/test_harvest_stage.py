"""`sae harvest` says what it will write, writes that much, and refuses what does not fit."""

import json
import re
import shutil

import pytest
from tiny_lms import save_checkpoint

import sae.activations.store
from sae.activations.store import DTYPES
from sae.config import DataConfig, HarvestConfig, LMConfig, RunConfig
from sae.errors import UserError
from sae.stages import common
from sae.stages.harvest import ensure_store

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def config(tmp_path, checkpoint):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"line {i} of some text, {'so ' * (i % 7)}"}) + "\n" for i in range(300))
    )
    return RunConfig(
        runs=str(tmp_path / "runs"),
        lm=LMConfig(name=str(checkpoint), device="cpu"),
        data=DataConfig(path=str(text), ctx_len=32, n_tokens=4000, n_eval_tokens=200),
        harvest=HarvestConfig(hook_names=HOOKS, shard_tokens=1000, batch_tokens=512),
    )


def in_bytes(words):
    number, unit = re.search(r"([\d.]+) (kB|MB|GB)", words).groups()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_it_says_beforehand_what_it_writes(config, capsys, dtype):
    config.harvest.dtype = dtype
    folder = ensure_store(config, common.open_lm(config.lm))
    printed = capsys.readouterr().out
    before, after = printed.splitlines()[0], printed.splitlines()[-1]
    files = list(folder.glob("shard-*/*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert "this will write about" in before
    assert str(folder) in before
    assert 0 <= size - in_bytes(before) <= 1024 * len(files) + 0.06 * size
    assert in_bytes(after) == pytest.approx(size, rel=0.06)
    result = json.loads((folder / "result.json").read_text())
    assert result["bytes_on_disk"] == size
    assert result["dtype"] == dtype
    per_token = {"bfloat16": 2 * 64, "float16": 2 * 64, "float32": 4 * 64, "int8": 2 * (32 + 4 * 2 + 4)}[dtype] + 13
    assert result["bytes_per_token"] == per_token
    assert result["n_bytes"] == (per_token - 13) * result["n_tokens"]
    assert f"{per_token:,} bytes a token" in after


def test_what_does_not_fit_is_refused_before_anything_is_written(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(sae.activations.store.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"would write .* kB .*has 100\.0 kB free.*harvest\.dtype=int8"):
        ensure_store(config, common.open_lm(config.lm))
    assert not list((config.folder / "harvest").rglob("*"))
    config.name, config.harvest.dtype = "smaller", "int8"
    config.data.n_tokens = 500
    ensure_store(config, common.open_lm(config.lm))
