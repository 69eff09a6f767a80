"""The environment that holds the peers: their own code judges the same data, in a process of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PEERS = Path(os.environ.get("SAE_PEERS_ENV") or Path(__file__).resolve().parents[2] / ".venv-peers")


def ask_peer(source, folder, *arguments):
    """Run a script there; return what it prints as JSON on its last line. Skips the test where there is none."""
    python = PEERS / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"there is no {str(python)!r}: `make peers` makes it, or set SAE_PEERS_ENV to one that is.")
    (folder / "worker.py").write_text(source)
    # Their environment must not find our package or settings through this one's.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python, folder / "worker.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
