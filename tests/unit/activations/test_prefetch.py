"""Prefetching: the same batches, an exact position, errors where they belong, no thread left behind."""

import gc
import os
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.activations.stream
from sae.activations.prefetch import Prefetch
from sae.activations.store import StoreReader, StoreWriter, TokenRows
from sae.activations.stream import ActivationBatch, StoreStream
from sae.errors import UserError
from sae.train.grid import grid
from sae.train.settings import TrainSettings
from sae.train.trainer import Interrupted, train

WIDTHS = {"a": 8, "b": 16, "c": 4}


def write(folder, n=230, dtype="bfloat16", widths=WIDTHS, shard_tokens=64):
    number = torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    acts = {name: torch.randn(n, width, generator=generator) for name, width in widths.items()}
    tokens = TokenRows(number.int(), torch.full((n,), 2, dtype=torch.uint8), number.int(), number.int())
    store = StoreWriter(folder, widths, n_tokens=n, shard_tokens=shard_tokens, dtype=dtype, seed=3)
    store.add(acts, tokens)
    store.finish()
    return folder


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8"])
def store(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"), dtype=request.param)


def open_stream(folder, batch_tokens=37, hook_names=None, dtype=torch.float32):
    return StoreStream(StoreReader(folder), batch_tokens=batch_tokens, hook_names=hook_names, seed=1, dtype=dtype)


class Numbers:
    """An endless stream of batches that hold their own number; raises what it is told to."""

    d_in = {"x": 1, "y": 2}  # noqa: RUF012
    batch_tokens = 3
    fingerprint = "numbers"

    def __init__(self, raises=None, delay=0.0):
        self.raises, self.delay, self.at = dict(raises or {}), delay, 0

    def next_batch(self):
        time.sleep(self.delay)
        if self.at in self.raises:
            raise self.raises[self.at]
        self.at += 1
        acts = {name: torch.full((3, width), float(self.at - 1)) for name, width in self.d_in.items()}
        return ActivationBatch(acts, lambda: None)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def value(batch):
    assert len({float(block.mean()) for block in batch.acts.values()}) == 1
    return int(batch.acts["x"][0, 0])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def assert_equal(one, two):
    assert list(one.acts) == list(two.acts)
    for name, block in one.acts.items():
        assert torch.equal(block.float(), two.acts[name].float())
    assert all(torch.equal(x, y) for x, y in zip(one.tokens, two.tokens, strict=True))


def test_the_same_batches_and_positions(store):
    plain, inner = open_stream(store), open_stream(store)
    with Prefetch(inner) as ahead:
        assert (ahead.d_in, ahead.batch_tokens, ahead.fingerprint) == (plain.d_in, 37, plain.fingerprint)
        assert ahead.state_dict() == plain.state_dict()
        for _ in range(25):
            one, two = plain.next_batch(), ahead.next_batch()
            assert_equal(one, two)
            assert all(block.dtype == torch.float32 for block in two.acts.values())
            assert ahead.state_dict() == plain.state_dict()
    assert_equal(plain.next_batch(), inner.next_batch())  # after closing, the inner stream is where the reader was


def test_what_is_handed_out_is_in_memory(store):
    """Not a view of a mapped file, which would be read only once the batch is used."""
    with Prefetch(open_stream(store, batch_tokens=15)) as ahead:
        for _ in range(30):
            for block in ahead.next_batch().acts.values():
                assert block.untyped_storage().nbytes() <= 2 * block.nbytes


def test_the_inner_type_is_kept_on_request(store):
    plain = open_stream(store).next_batch()
    with Prefetch(open_stream(store), dtype=None) as ahead:
        batch = ahead.next_batch()
    assert {name: block.dtype for name, block in batch.acts.items()} == {
        name: block.dtype for name, block in plain.acts.items()
    }


@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    batch_tokens=st.integers(1, 300),
    depth=st.integers(1, 5),
)
def test_killed_anywhere_it_goes_on_exactly(tmp_path_factory, stops, batch_tokens, depth):
    """Each life reads some batches and dies with others prepared; the next knows only the saved position."""
    folder = tmp_path_factory.getbasetemp() / "resume-store"
    if not folder.exists():
        write(folder)
    plain, state = open_stream(folder, batch_tokens), None
    for stop in stops:
        ahead = Prefetch(open_stream(folder, batch_tokens), depth=depth)
        if state is not None:
            ahead.load_state_dict(state)
        for _ in range(stop):
            assert_equal(plain.next_batch(), ahead.next_batch())
        state = ahead.state_dict()
        assert state == plain.state_dict()
        ahead.close()


def test_the_position_is_of_what_was_handed_out_not_of_what_is_prepared():
    inner = Numbers()
    with Prefetch(inner, depth=4) as ahead:
        ahead.next_batch()
        time.sleep(0.1)
        assert inner.at >= 5
        assert ahead.state_dict() == {"at": 1}


def test_it_prepares_no_more_than_it_is_told():
    inner = Numbers()
    with Prefetch(inner, depth=3) as ahead:
        ahead.next_batch()
        time.sleep(0.1)
        assert inner.at == 4


def test_going_elsewhere_in_the_middle():
    with Prefetch(Numbers(delay=0.002), depth=3) as ahead:
        read = []
        for start in (0, 7, 3, 3, 100, 0):
            ahead.load_state_dict({"at": start})
            assert ahead.state_dict() == {"at": start}
            read += [value(ahead.next_batch()) for _ in range(start % 4 + 1)]
            assert len(threads()) <= 1
    assert read == [0, 7, 8, 9, 10, 3, 4, 5, 6, 3, 4, 5, 6, 100, 0]


@pytest.mark.parametrize("error", [ValueError("torn"), StopIteration(), UserError("damaged"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_comes_in_place_of_its_batch(error, at):
    inner = Numbers({at: error})
    ahead = Prefetch(inner, depth=3)
    assert [value(ahead.next_batch()) for _ in range(at)] == list(range(at))
    for _ in range(2):  # it stays: asking again asks the inner stream again
        with pytest.raises(type(error)) as caught:
            ahead.next_batch()
        assert caught.value is error
        assert ahead.state_dict() == {"at": at}
    assert not threads()
    inner.raises.clear()  # mended, it goes on with the batch that failed
    assert [value(ahead.next_batch()) for _ in range(3)] == [at, at + 1, at + 2]
    ahead.close()


def test_a_damaged_shard_is_named_at_the_batch_that_needs_it(tmp_path):
    folder = write(tmp_path)
    damaged = folder / "shard-00002" / "b.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    before = sum(StoreReader(folder).info.shard_rows[:2])
    plain = open_stream(folder)
    with Prefetch(open_stream(folder), depth=4) as ahead:
        for _ in range(before // 37):
            assert_equal(plain.next_batch(), ahead.next_batch())
        for _ in range(2):
            with pytest.raises(UserError, match=r"shard-00002.*b\.safetensors"):
                ahead.next_batch()
            with pytest.raises(UserError, match=r"shard-00002.*b\.safetensors"):
                plain.next_batch()
            assert ahead.state_dict() == plain.state_dict()


def test_an_interrupt_while_waiting_loses_no_batch(monkeypatch):
    with Prefetch(Numbers(delay=0.01)) as ahead:
        assert value(ahead.next_batch()) == 0
        take = ahead._worker.take

        def interrupted():
            take()  # a batch was already in hand when the signal came
            raise KeyboardInterrupt

        monkeypatch.setattr(ahead._worker, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.next_batch()
        assert ahead.state_dict() == {"at": 1}
        assert [value(ahead.next_batch()) for _ in range(3)] == [1, 2, 3]


def test_no_thread_is_left_behind():
    with Prefetch(Numbers()) as ahead:
        assert not threads(), "nothing is read before it is asked for"
        ahead.next_batch()
        assert len(threads()) == 1
    assert not threads()
    ahead.close()
    dropped = Prefetch(Numbers())
    dropped.next_batch()
    del dropped
    gc.collect()
    assert not threads(), "a stream that is dropped without being closed ends its thread"


def test_one_hook_point_of_many(store):
    with Prefetch(open_stream(store, hook_names=["c"])) as ahead:
        assert ahead.d_in == {"c": 4}
        assert list(ahead.next_batch().acts) == ["c"]


def test_token_fields_are_not_read_unless_asked_for(tmp_path):
    folder = write(tmp_path)
    for file in folder.rglob("tokens.safetensors"):
        file.unlink()
    with Prefetch(open_stream(folder)) as ahead:
        batches = [ahead.next_batch() for _ in range(9)]
        with pytest.raises(UserError, match=r"tokens\.safetensors"):
            _ = batches[0].tokens


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    batch_tokens=st.integers(1, 90),
    run_bytes=st.sampled_from([1, 64, 200, 4096]),
    resume_at=st.integers(0, 12),
    dtype=st.sampled_from(["bfloat16", "float32", "int8"]),
    given_as=st.sampled_from([None, torch.float32]),
)
def test_every_epoch_is_a_permutation_in_runs_of_rows(
    tmp_path_factory, n, batch_tokens, run_bytes, resume_at, dtype, given_as
):
    folder = write(tmp_path_factory.mktemp("store"), n, dtype, {"a": 5, "b": 9}, shard_tokens=70)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae.activations.stream, "RUN_BYTES", run_bytes)
        patch.setattr(sae.activations.stream, "MIN_RUNS", 3)
        stream = open_stream(folder, batch_tokens, dtype=given_as)
        reader = StoreReader(folder)
        shards = [reader.read_shard(i) for i in range(len(reader.info.shard_rows))]
        rows = {
            int(token): {name: block[i] for name, block in shard.acts.items()}
            for shard in shards
            for i, token in enumerate(shard.tokens.token)
        }
        seen, states, batches = [], [], []
        while len(seen) < 3 * n or len(batches) < 13:
            states.append(stream.state_dict())
            batches.append(stream.next_batch())
            seen += batches[-1].tokens.token.tolist()
        for epoch in range(3):
            assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
        want = torch.float32 if given_as or dtype == "int8" else reader.read_shard(0).acts["a"].dtype
        for batch in batches[:: max(1, len(batches) // 8)]:  # only now: later batches must not have touched them
            assert all(block.dtype == want for block in batch.acts.values())
            for i, token in enumerate(batch.tokens.token.tolist()):
                assert all(torch.equal(batch.acts[name][i], block.to(want)) for name, block in rows[token].items())
        again = open_stream(folder, batch_tokens, dtype=given_as)
        again.load_state_dict(states[resume_at])
        assert_equal(again.next_batch(), batches[resume_at])


def test_training_from_it_is_bit_for_bit_training_without_it(tmp_path):
    """Interrupted and resumed on the way, too."""
    folder = write(tmp_path / "store", n=3000, widths={"a": 16, "b": 16}, shard_tokens=1000)
    settings = TrainSettings(total_tokens=60 * 64, batch_tokens=64, checkpoint_seconds=1e9)
    specs = grid(["a", "b"], [32], ["topk"], [4], [0])

    def run(name, stream, stop_at=None):
        def progress(done, _):
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        result = train(stream, specs, settings, tmp_path / name, lm_name="toy", progress=progress)
        return [(item.folder / "weights.safetensors").read_bytes() for item in result.saes]

    plain = run("plain", open_stream(folder, 64))
    with Prefetch(open_stream(folder, 64)) as ahead:
        assert run("ahead", ahead) == plain
    with Prefetch(open_stream(folder, 64)) as ahead, pytest.raises(Interrupted):
        run("resumed", ahead, stop_at=23)
    with Prefetch(open_stream(folder, 64)) as ahead:
        assert run("resumed", ahead) == plain
