"""Workers: what is said between processes, and what happens when one of them fails."""

import sys
import textwrap

import numpy as np
import pytest

from sae.bench.options import BenchOptions
from sae.bench.process import WORKERS, Contestant, Worker, command
from sae.errors import UserError

TOY = """
    import os, sys
    sys.path.insert(0, {folder!r})
    import protocol, torch

    class Toy(protocol.Trainee):
        description = protocol.Description(options="a toy")

        def __init__(self, request):
            if request.d_in == 13:
                raise ValueError("thirteen is unlucky")
            self.started = self.seen = 0
            self.firsts = []

        def start(self, batches):
            self.started = len(batches)

        def step(self, x):
            print("a library says hello")
            os.write(1, b"and so does its C code\\n")
            if x.isnan().any():
                sys.stderr.write("some trace\\nCakeError: out of cake\\n")
                os._exit(3)
            self.firsts.append(float(x[0, 0]))

        def reconstruct(self, x, selection):
            if selection == protocol.TRAINING:
                return x, torch.eye(len(x))
            return torch.full_like(x, self.firsts[-1]), torch.ones(len(x), 3)

    assert sys.stdin.read is not None
    protocol.serve("torch", Toy)
"""
REQUEST = {
    "architecture": "topk", "d_in": 2, "d_sae": 4, "k": 1, "batch_tokens": 3, "lr": 0.1, "n_steps": 5, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    script = tmp_path_factory.mktemp("toy") / "toy.py"
    script.write_text(textwrap.dedent(TOY.format(folder=str(WORKERS))))
    with Worker("toy", [sys.executable, str(script)]) as worker:
        yield worker


@pytest.fixture
def activations(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12, dtype=np.float32).reshape(2, 3, 2))
    return path


def test_a_worker_answers_whatever_its_libraries_print(toy, activations, tmp_path):
    assert toy.ask("hello")["version"].startswith("2.")
    assert toy.ask("build", **REQUEST) == {"dtype": "float32", "kernels": "torch", "options": "a toy"}
    assert toy.ask("load", path=str(activations)) == {"n_batches": 2}
    found = toy.ask("run", n_steps=3)  # 0, 6, and 0 again
    assert len(found["ms"]) == 3
    assert all(ms > 0 for ms in found["ms"])
    held_out = tmp_path / "held-out.npy"
    np.save(held_out, np.array([[1, 1], [-1, -1], [3, -3], [-3, 3]], dtype=np.float32))
    whole = toy.ask("evaluate", path=str(held_out), batch_tokens=3, selection="training")
    assert whole == {"fvu": 0.0, "l0": 1.0, "dead_fraction": 0.0}
    # Reconstructing the mean, which is 0 here, explains nothing.
    mean = toy.ask("evaluate", path=str(held_out), batch_tokens=3, selection="inference")
    assert mean == {"fvu": 1.0, "l0": 3.0, "dead_fraction": 0.0}


def test_a_refusal_is_one_sentence_and_the_worker_goes_on(toy, activations):
    with pytest.raises(UserError, match=r"'toy' could not build: ValueError: thirteen is unlucky; .*bench\.peers"):
        toy.ask("build", **{**REQUEST, "d_in": 13})
    with pytest.raises(UserError, match="build something first"):
        toy.ask("run", n_steps=1)
    with pytest.raises(UserError, match="'dance' is no request"):
        toy.ask("dance")
    toy.ask("build", **REQUEST)
    with pytest.raises(UserError, match="load activations first"):
        toy.ask("run", n_steps=1)
    assert toy.ask("load", path=str(activations)) == {"n_batches": 2}


def test_a_death_is_told_with_the_last_words(toy, tmp_path):
    toy.ask("build", **REQUEST)
    np.save(tmp_path / "bad.npy", np.full((1, 3, 2), np.nan, dtype=np.float32))
    toy.ask("load", path=str(tmp_path / "bad.npy"))
    with pytest.raises(UserError, match=r"'toy' died when asked to run \(status 3\).*CakeError: out of cake"):
        toy.ask("run", n_steps=1)
    with pytest.raises(UserError, match="died when asked to hello"):
        toy.ask("hello")


def test_a_worker_that_never_starts_or_talks_nonsense():
    with (
        Worker("absent", [sys.executable, "-c", "raise SystemExit('no such library')"]) as worker,
        pytest.raises(UserError, match="no such library"),
    ):
        worker.ask("hello")
    with (
        Worker("noisy", [sys.executable, "-c", "input(); print('hello there', flush=True); input()"]) as worker,
        pytest.raises(UserError, match=r"'hello there.*not JSON"),
    ):
        worker.ask("hello")


def test_missing_peers_are_told_how_to_come(tmp_path):
    options = BenchOptions(peers_env=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"make peers.*bench\.peers=\[\]"):
        command(Contestant("sparsify", "float32"), options)
    assert command(Contestant("reference", "reference"), options)[0] == sys.executable
