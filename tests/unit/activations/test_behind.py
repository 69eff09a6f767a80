"""Writing behind the language model: in order, bounded, failing at once, exact after a kill."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from sae.activations.behind import Behind
from sae.activations.harvest import harvest
from sae.activations.store import Shard, StoreReader, TokenRows
from sae.errors import UserError

SIZES = [70, 33, 90, 20, 64, 51, 80, 44]


class FakeLM:
    name, fingerprint = "fake", "f" * 64


class FakePasses:
    """Forward passes whose rows are known; may raise at one of them."""

    def __init__(self, raises=None, at=None, nan_at=None):
        self.lm = FakeLM()
        self.d_in = {"a": 12, "b": 20}
        self.n_tokens = sum(SIZES)
        self.raises, self.at, self.nan_at, self.made = raises, at, nan_at, []

    def __len__(self):
        return len(SIZES)

    def __call__(self, number):
        if number == self.at:
            raise self.raises
        self.made.append(number)
        n, start = SIZES[number], sum(SIZES[:number])
        generator = torch.Generator().manual_seed(number)
        acts = {name: torch.randn(n, width, generator=generator) for name, width in self.d_in.items()}
        if number == self.nan_at:
            acts["b"][0, 0] = float("nan")
        index = torch.arange(start, start + n)
        return Shard(acts, TokenRows(index.int(), torch.full((n,), 2, dtype=torch.uint8), index.int(), index.int()))


def run(folder, passes, dtype="int8"):
    return harvest(passes, folder, shard_tokens=100, dtype=dtype, seed=1)


def threads():
    return {thread.name for thread in threading.enumerate()} & {"behind", "finish-shard_0", "finish-shard_1"}


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_calls_are_made_in_order_while_the_caller_goes_on():
    done, gate = [], threading.Event()
    with Behind(depth=2) as behind:
        behind.submit(gate.wait)
        behind.submit(lambda: done.append(1))
        behind.submit(lambda: done.append(2))
        assert done == [], "the caller came here although the first call has not returned"
        gate.set()
    assert done == [1, 2]
    assert not threads()


def test_the_queue_is_bounded():
    gate, submitted = threading.Event(), []

    def caller():
        with Behind(depth=2) as behind:
            for number in range(6):
                behind.submit(gate.wait)
                submitted.append(number)

    thread = threading.Thread(target=caller)
    thread.start()
    time.sleep(0.2)
    assert len(submitted) == 3, "one running, two waiting"
    gate.set()
    thread.join()
    assert len(submitted) == 6


def test_a_failure_is_raised_at_the_next_call_and_nothing_is_done_after_it():
    done = []

    def fail():
        raise OSError(28, "No space left on device")

    n_submitted = 0
    with pytest.raises(OSError, match="No space"), Behind(depth=1) as behind:  # noqa: PT012
        behind.submit(fail)
        for _ in range(100):
            behind.submit(lambda: done.append(1))
            n_submitted += 1
            time.sleep(0.01)
    assert done == []
    assert n_submitted < 5
    assert not threads()


def test_a_failure_in_the_last_call_is_raised_too():
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.submit(lambda: 1 / 0)


def test_an_interrupt_drops_what_has_not_begun_and_waits_for_what_has():
    started, finished, dropped = threading.Event(), [], []

    def slow():
        started.set()
        time.sleep(0.2)
        finished.append(1)

    with pytest.raises(KeyboardInterrupt), Behind() as behind:  # noqa: PT012
        behind.submit(slow)
        behind.submit(lambda: dropped.append(1))
        started.wait()
        raise KeyboardInterrupt
    assert finished == [1]
    assert dropped == []
    assert not threads()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("at", [0, 1, 5, 7])
def test_an_interrupted_harvest_resumes_to_the_same_bytes(tmp_path, monkeypatch, at, dtype):
    monkeypatch.setattr("sae.activations.store.FLUSH_BYTES", (6_000, 6_000))  # several flushes on the way
    monkeypatch.setattr("sae.activations.store.FLUSH_BYTES_PER_SHARD", 0)
    run(tmp_path / "whole", FakePasses(), dtype)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", FakePasses(KeyboardInterrupt(), at), dtype)
    assert not threads()
    again = FakePasses()
    run(tmp_path / "broken", again, dtype)
    assert at < 5 or again.made[0] > 0, "passes that were on disk are not run again"
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_an_activation_that_is_not_finite_stops_the_passes(tmp_path):
    passes = FakePasses(nan_at=1)
    with pytest.raises(UserError, match=r"'b' gives NaN"):
        run(tmp_path, passes)
    assert len(passes.made) < len(SIZES)
    assert not threads()
    with pytest.raises(UserError, match="no finished activation store"):
        StoreReader(tmp_path)


def test_a_harvest_killed_for_good_twice_resumes_to_the_same_bytes(tmp_path):
    """SIGKILL from outside, wherever the two threads are."""
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import sae.activations.store as store
        import test_behind as t
        from pathlib import Path
        store.FLUSH_BYTES, store.FLUSH_BYTES_PER_SHARD = (6_000, 6_000), 0
        class Slow(t.FakePasses):
            def __call__(self, number):
                time.sleep(0.03)
                return super().__call__(number)
        finish = store.StoreWriter._finish_shard
        def slow_finish(self, shard):
            time.sleep(0.03)
            return finish(self, shard)
        store.StoreWriter._finish_shard = slow_finish
        print("ready", flush=True)
        t.run(Path({str(tmp_path / "broken")!r}), Slow())
    """)
    kills = 0
    for delay in (0.12, 0.22, None):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        if delay is not None:
            time.sleep(delay)
            process.kill()
        kills += process.wait() != 0
        process.stdout.close()
    assert kills >= 1
    run(tmp_path / "whole", FakePasses())
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
