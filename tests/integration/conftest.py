"""Runs of the command line on a tiny random model and a little text, in a folder of their own."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_lms import save_checkpoint

from sae.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny random Llama."""
    return save_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A JSON-lines file of forty short documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "looked",
        "at",
        "every",
        "bird",
        "that",
        "flew",
        "over",
        "its",
        "house",
    ]
    documents = [" ".join(words[(i * j) % len(words)] for j in range(1, 25)) + f" {i}." for i in range(40)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def sae(model, text, tmp_path, capsys):
    """Run `sae <stage> ...` on the tiny model; returns (exit status, stdout, stderr)."""

    def run(stage, *overrides, defaults=True):
        given = [f"runs={tmp_path}"]
        if defaults:
            given += [
                f"lm.name={model}",
                f"data.path={text}",
                "data.ctx_len=32",
                "data.n_tokens=3000",
                "data.n_eval_tokens=300",
                "harvest.batch_tokens=512",
                "harvest.shard_tokens=1000",
                "harvest.hook_names=[blocks.0.hook_resid_post,blocks.1.hook_mlp_out]",
                "sae.d_sae=[32,64]",
                "sae.l0=[4]",
                "train.total_tokens=4096",
                "train.batch_tokens=256",
            ]
        try:
            main([stage, *given, *overrides])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    run.folder = Path(tmp_path)
    return run


@pytest.fixture
def greeting(tmp_path):
    """A contrast set whose prompts have partners of their length."""
    path = tmp_path / "greeting.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"{word} {index}"}],
            "label": int(word == "good"),
            "topic": str(index),
            "behavior_texts": ["Dear"],
            "alternative_texts": ["No"],
            "split": ("find", "select", "report")[index % 3],
        }
        for index in range(9)
        for word in ("good", "evil")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
