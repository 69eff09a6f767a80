"""The store: nothing lost, truly shuffled, resumable after a kill, honest about damage."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.store import StoreReader, StoreWriter, TokenRows, check_disk
from sae.activations.stream import StoreStream
from sae.errors import UserError

HOOKS = {"blocks.0.hook_resid_post": 4, "blocks.1.hook_resid_post": 6}


def rows(start, n):
    """Rows whose activations carry their own number, so that any mix-up shows."""
    number = torch.arange(start, start + n)
    acts = {name: number[:, None].float().expand(n, width) / 4 for name, width in HOOKS.items()}
    return acts, TokenRows(
        number.int(), torch.full((n,), 2, dtype=torch.uint8), (number // 10).int(), (number % 10).int()
    )


def writer(folder, n_tokens, **changes):
    options = {"n_tokens": n_tokens, "shard_tokens": 64, "dtype": "float32", "seed": 3} | changes
    return StoreWriter(folder, HOOKS, **options)


def write(folder, sizes, **changes):
    store = writer(folder, sum(sizes), **changes)
    for i in range(store.next_pass, len(sizes)):
        store.add(*rows(sum(sizes[:i]), sizes[i]))
    return store.finish()


def read_all(folder):
    reader = StoreReader(folder)
    shards = [reader.read_shard(i) for i in range(len(reader.info.shard_rows))]
    tokens = torch.cat([shard.tokens.token for shard in shards])
    acts = {name: torch.cat([shard.acts[name] for shard in shards]) for name in HOOKS}
    return tokens, acts


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=6), shard_tokens=st.integers(8, 200))
def test_every_row_is_stored_once_and_stays_together(tmp_path_factory, sizes, shard_tokens):
    folder = tmp_path_factory.mktemp("store")
    info = write(folder, sizes, shard_tokens=shard_tokens)
    tokens, acts = read_all(folder)
    assert info.n_tokens == sum(sizes)
    assert sorted(tokens.tolist()) == list(range(sum(sizes)))
    for name, width in HOOKS.items():
        assert acts[name].shape == (sum(sizes), width)
        assert torch.equal(acts[name][:, 0] * 4, tokens.float())


def test_the_order_is_a_uniform_permutation(tmp_path):
    """Each token is equally likely to land at each place: chi-square over tenths of the store, many seeds."""
    n, bins = 200, 10
    counts = np.zeros((bins, bins))
    neighbours = 0
    n_seeds = 60
    for seed in range(n_seeds):
        folder = tmp_path / str(seed)
        write(folder, [50] * 4, seed=seed, shard_tokens=40)
        tokens = read_all(folder)[0].numpy()
        place = np.empty(n, dtype=int)
        place[tokens] = np.arange(n)
        np.add.at(counts, (np.arange(n) * bins // n, place * bins // n), 1)
        neighbours += np.sum(np.abs(np.diff(tokens)) == 1)
    expected = n_seeds * n / bins**2
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 81 degrees of freedom: mean 81, sd 12.7; a contiguous write order would give thousands.
    assert chi2 < 81 + 5 * 12.7
    # A uniform permutation has 2(n-1)/n neighbouring pairs in expectation, sd about sqrt(2).
    assert abs(neighbours / n_seeds - 2 * (n - 1) / n) < 5 * np.sqrt(2 / n_seeds)


@pytest.mark.parametrize("killed_after", [0, 1, 3, 5])
def test_a_killed_harvest_resumes_to_the_same_bytes(tmp_path, killed_after):
    sizes = [70, 33, 90, 20, 64, 51]
    whole = write(tmp_path / "whole", sizes)
    broken = writer(tmp_path / "broken", sum(sizes))
    for i in range(killed_after):
        broken.add(*rows(sum(sizes[:i]), sizes[i]))
        if i % 2 == 0:
            broken.flush()
    # The kill: what is in memory is gone, and a part file has a torn row behind the journalled ones.
    for part in (tmp_path / "broken").glob("parts/*.bin"):
        with part.open("ab") as file:
            file.write(b"torn")
    del broken
    resumed = write(tmp_path / "broken", sizes)
    assert resumed.checksums == whole.checksums
    assert resumed.shard_rows == whole.shard_rows
    assert not (tmp_path / "broken" / "parts").exists()


def test_a_kill_while_finishing_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    sizes = [100, 100, 100]
    whole = write(tmp_path / "whole", sizes)
    finish_shard = StoreWriter._finish_shard

    def dies(self, shard):
        if shard == 2:
            raise KeyboardInterrupt
        return finish_shard(self, shard)

    monkeypatch.setattr(StoreWriter, "_finish_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken", sizes)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no finished activation store"):
        StoreReader(tmp_path / "broken")
    assert write(tmp_path / "broken", sizes).checksums == whole.checksums


def test_two_failures_while_finishing_lose_nothing(tmp_path, monkeypatch):
    sizes = [100, 100, 100]
    whole = write(tmp_path / "whole", sizes)
    finish_shard = StoreWriter._finish_shard

    def dies(self, shard):
        if shard == 2:
            raise OSError(28, "No space left on device")
        return finish_shard(self, shard)

    monkeypatch.setattr(StoreWriter, "_finish_shard", dies)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "broken", sizes)
    monkeypatch.undo()
    assert write(tmp_path / "broken", sizes).checksums == whole.checksums


def test_another_plan_does_not_continue_an_unfinished_store(tmp_path):
    store = writer(tmp_path, 100)
    store.add(*rows(0, 50))
    store.flush()
    for changes in ({"seed": 4}, {"identity": "other text"}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match="another configuration"):
            writer(tmp_path, 100, **changes)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    write(tmp_path, [100])
    path = tmp_path / "shard-00000" / "blocks.1.hook_resid_post.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"blocks\.1\.hook_resid_post"):
        StoreReader(tmp_path).read_shard(0)


def test_nan_activations_stop_the_harvest(tmp_path):
    acts, tokens = rows(0, 20)
    acts["blocks.0.hook_resid_post"] = acts["blocks.0.hook_resid_post"].clone()
    acts["blocks.0.hook_resid_post"][7, 2] = float("nan")
    with pytest.raises(UserError, match=r"blocks.0.hook_resid_post.*position 7"):
        writer(tmp_path, 20).add(acts, tokens)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="float8"):
        writer(tmp_path, 10, dtype="float8")
    write(tmp_path / "store", [100])
    with pytest.raises(UserError, match=r"blocks\.7"):
        StoreReader(tmp_path / "store").read_shard(0, ["blocks.7.hook_resid_post"])
    with pytest.raises(UserError, match="GB free"):
        check_disk(tmp_path, 10**18)


@settings(max_examples=20, deadline=None)
@given(batch_tokens=st.integers(1, 90), resume_at=st.integers(0, 12))
def test_stream_covers_every_epoch_and_resumes_exactly(tmp_path_factory, batch_tokens, resume_at):
    folder = tmp_path_factory.mktemp("store")
    write(folder, [60, 60], shard_tokens=50)
    stream = StoreStream(StoreReader(folder), batch_tokens=batch_tokens, seed=1)
    n_batches = max(14, -(-240 // batch_tokens))
    seen, states = [], []
    for _ in range(n_batches):
        states.append(stream.state_dict())
        batch = stream.next_batch()
        assert batch.tokens.token.shape == (batch_tokens,)
        seen.append(batch.tokens.token)
    flat = torch.cat(seen)
    assert sorted(flat[:120].tolist()) == list(range(120))
    assert sorted(flat[120:240].tolist()) == list(range(120))
    assert not torch.equal(flat[:120], flat[120:240])
    again = StoreStream(StoreReader(folder), batch_tokens=batch_tokens, seed=1)
    again.load_state_dict(states[resume_at])
    assert torch.equal(again.next_batch().tokens.token, seen[resume_at])
    shutil.rmtree(folder)
