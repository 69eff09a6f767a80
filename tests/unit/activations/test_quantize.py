"""Eight-bit storage: errors within their bound, outliers untouched, sizes as promised, the same bytes after a kill."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.activations.reader
from sae.activations.layout import DTYPES, record_bytes
from sae.activations.quantize import dequantize, n_outliers, pick_outliers, quantize
from sae.activations.store import StoreReader, StoreWriter, TokenRows, estimate_bytes
from sae.activations.stream import StoreStream
from sae.errors import UserError


def tokens(start, n):
    number = torch.arange(start, start + n)
    return TokenRows(number.int(), torch.full((n,), 2, dtype=torch.uint8), number.int() // 7, number.int() % 7)


def activations(n, d_in, seed=0, massive=(400.0, -150.0, 60.0)):
    """Like a language model's: channels of different sizes, a few of them massive."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, d_in, generator=generator) * torch.exp(torch.randn(d_in, generator=generator) / 2)
    for channel, size in zip(torch.randperm(d_in, generator=generator).tolist(), massive, strict=False):
        acts[:, channel] = acts[:, channel] * 5 + size
    return acts


def write(folder, blocks, *, stop=None, **options):
    """Write blocks of `{hook: acts}`; with `stop`, die after so many without finishing."""
    sizes = [len(next(iter(block.values()))) for block in blocks]
    d_in = {name: acts.shape[1] for name, acts in blocks[0].items()}
    store = StoreWriter(folder, d_in, n_tokens=sum(sizes), **({"shard_tokens": 64, "seed": 3} | options))
    for i in range(store.next_pass, len(blocks)):
        if stop is not None and i >= stop:
            return None
        store.add(blocks[i], tokens(sum(sizes[:i]), sizes[i]))
        if stop is not None:
            store.flush()
    return store.finish()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    d_in=st.integers(1, 70),
    exponent=st.integers(-30, 30),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_errors_are_within_half_a_step_and_outliers_are_as_in_bfloat16(n, d_in, exponent, kind, seed):
    acts = activations(n, d_in, seed) * 2.0 ** (0 if kind == torch.float16 else exponent)
    acts = acts.to(kind)
    before = acts.clone()
    channels = torch.tensor(pick_outliers(acts), dtype=torch.long)
    stored = quantize(acts, channels)
    assert torch.equal(acts, before), "the input is left alone"
    assert (stored.acts.dtype, stored.outliers.dtype, stored.scale.dtype) == (torch.int8, torch.bfloat16, torch.float32)
    back = dequantize(stored, channels)
    assert back.shape == acts.shape
    assert back.dtype == torch.float32
    assert torch.equal(back[:, channels], acts[:, channels].bfloat16().float())
    rest = torch.ones(d_in, dtype=torch.bool)
    rest[channels] = False
    error = (back - acts.float())[:, rest].abs()
    assert (error <= 0.5001 * stored.scale[:, None]).all()
    if rest.any():  # the scale is set by the channels that use it, and used in full
        largest = acts.float()[:, rest].abs().amax(dim=1)
        torch.testing.assert_close(stored.scale, largest / 127, rtol=1e-6, atol=0)
        assert (stored.acts.abs().amax(dim=1) == 127)[largest > 0].all()


def test_a_row_does_not_depend_on_its_neighbours():
    acts = activations(50, 96)
    channels = torch.tensor(pick_outliers(acts))
    whole = quantize(acts, channels)
    for i in range(0, 50, 9):
        alone = quantize(acts[i : i + 1], channels)
        assert all(torch.equal(one[0], many[i]) for one, many in zip(alone, whole, strict=True))


def test_rows_of_zeros_and_of_the_tiniest_numbers():
    acts = torch.tensor([[0.0, 0.0, 0.0], [1e-45, 0.0, -1e-45], [1e-38, -1e-40, 3e-44]])
    back = dequantize(quantize(acts, torch.empty(0, dtype=torch.long)), torch.empty(0, dtype=torch.long))
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back, acts, atol=1e-40, rtol=0.01)


def test_massive_channels_are_the_ones_kept_apart():
    acts = activations(500, 512)
    massive = set(acts.abs().mean(dim=0).topk(3).indices.tolist())
    chosen = pick_outliers(acts)
    assert massive <= set(chosen)
    assert chosen == sorted(chosen)
    assert len(chosen) == n_outliers(512) == 16
    assert pick_outliers(torch.ones(5, 128)) == [0, 1, 2, 3], "the first of equals"
    # What they are kept apart for: without, their size would be every channel's step.
    none = torch.empty(0, dtype=torch.long)
    with_, without = (dequantize(quantize(acts, c), c) for c in (torch.tensor(chosen), none))
    assert (with_ - acts).square().sum() < (without - acts).square().sum() / 100


@pytest.mark.parametrize("d_in", [512, 768, 2304, 4096])
def test_at_most_56_percent_of_the_bytes_of_bfloat16(tmp_path, d_in):
    blocks = [{"hook": activations(300, d_in)}]
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        write(tmp_path / dtype, blocks, dtype=dtype)
        sizes[dtype] = sum(file.stat().st_size for file in (tmp_path / dtype).rglob("shard-*/*"))
    headers = sum(1024 for _ in (tmp_path / "int8").rglob("shard-*/*"))
    assert sizes["int8"] - headers <= 0.56 * sizes["bfloat16"]
    assert record_bytes({"hook": d_in}, "int8") <= 0.56 * record_bytes({"hook": d_in}, "bfloat16")


@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    d_in=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    n=st.integers(1, 150),
)
def test_estimates_are_the_sizes_on_disk(tmp_path_factory, dtype, d_in, n):
    folder = tmp_path_factory.mktemp("store")
    blocks = [{f"hook{i}": activations(n, width, seed=i) for i, width in enumerate(d_in)}]
    info = write(folder, blocks, dtype=dtype)
    files = list(folder.glob("shard-*/*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    on_disk = sum(file.stat().st_size for file in files)
    widths = {f"hook{i}": width for i, width in enumerate(d_in)}
    assert on_disk - headers == estimate_bytes(widths, n, dtype) == info.total_bytes == n * info.bytes_per_token
    assert headers < 1024 * len(files)
    acts_only = sum(file.stat().st_size for file in files if file.name != "tokens.safetensors")
    assert 0 <= acts_only - info.n_bytes <= headers


def test_the_same_tokens_in_the_same_places_as_in_bfloat16(tmp_path):
    blocks = [{"a": activations(90, 48, i), "b": activations(90, 20, i + 9).bfloat16()} for i in range(3)]
    readers = {}
    for dtype in ("bfloat16", "int8"):
        write(tmp_path / dtype, blocks, dtype=dtype)
        readers[dtype] = StoreReader(tmp_path / dtype)
    for shard in range(len(readers["int8"].info.shard_rows)):
        exact, eight = (readers[dtype].read_shard(shard) for dtype in ("bfloat16", "int8"))
        assert all(torch.equal(x, y) for x, y in zip(exact.tokens, eight.tokens, strict=True))
        for name in ("a", "b"):
            channels = readers["int8"].info.outlier_channels[name]
            assert torch.equal(eight.acts[name][:, channels], exact.acts[name][:, channels].float())
            rest = [c for c in range(exact.acts[name].shape[1]) if c not in channels]
            limit = 0.51 / 127 * exact.acts[name][:, rest].float().abs().amax(dim=1, keepdim=True)
            rounding = exact.acts[name][:, rest].float().abs() / 256  # of the bfloat16 that it is compared with
            assert ((eight.acts[name] - exact.acts[name].float())[:, rest].abs() <= limit * 1.01 + rounding).all()


@pytest.mark.parametrize("killed_after", [0, 1, 2, 4])
def test_a_killed_harvest_keeps_the_choice_of_channels(tmp_path, killed_after):
    """Later passes would choose other channels: the first pass decides, before the kill and after it."""
    blocks = []
    for i in range(5):
        acts = torch.randn(70, 64, generator=torch.Generator().manual_seed(i))
        acts[:, 10 * i : 10 * i + 4] *= 50
        blocks.append({"hook": acts})
    whole = write(tmp_path / "whole", blocks, dtype="int8")
    assert whole.outlier_channels == {"hook": [0, 1, 2, 3]}
    assert write(tmp_path / "broken", blocks, dtype="int8", stop=killed_after) is None
    for part in (tmp_path / "broken").glob("parts/*.bin"):
        with part.open("ab") as file:
            file.write(b"torn")
    resumed = write(tmp_path / "broken", blocks, dtype="int8")
    assert resumed.outlier_channels == whole.outlier_channels
    assert resumed.checksums == whole.checksums
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "broken" / file.relative_to(tmp_path / "whole")).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_what_cannot_be_stored_stops_the_harvest(tmp_path, bad):
    acts = activations(20, 32)
    acts[7, 2] = bad  # the last rounds to infinity in bfloat16, in which an outlier would be stored
    with pytest.raises(UserError, match=r"hook.*document 1, position 0"):
        write(tmp_path, [{"hook": acts}], dtype="int8")


def test_a_shard_is_never_decoded_whole(tmp_path, monkeypatch):
    write(tmp_path, [{"a": activations(300, 24), "b": activations(300, 24, 1)}], dtype="int8", shard_tokens=300)
    decoded = []

    def spy(stored, channels):
        decoded.append(len(stored.scale))
        return dequantize(stored, channels)

    monkeypatch.setattr(sae.activations.reader, "dequantize", spy)
    stream = StoreStream(StoreReader(tmp_path), batch_tokens=50)
    for _ in range(13):
        batch = stream.next_batch()
        assert list(batch.acts) == ["a", "b"]
        assert all((acts.shape, acts.dtype) == ((50, 24), torch.float32) for acts in batch.acts.values())
    assert max(decoded) == 50


def test_passes_without_a_row_leave_the_choice_open(tmp_path):
    blocks = [{"hook": torch.empty(0, 40)}, {"hook": activations(30, 40)}]
    info = write(tmp_path, blocks, dtype="int8")
    assert info.outlier_channels == {"hook": pick_outliers(blocks[1]["hook"])}


def test_the_error_of_a_real_looking_store_is_small(tmp_path):
    acts = activations(2000, 512)
    write(tmp_path, [{"hook": acts}], dtype="int8", shard_tokens=2000)
    shard = StoreReader(tmp_path).read_shard(0)
    exact = acts[shard.tokens.token.long()]
    error = (shard.acts["hook"] - exact).square().sum() / (exact - exact.mean(dim=0)).square().sum()
    assert error < 1e-3
    assert np.isclose(shard.acts["hook"].mean(), exact.mean(), rtol=1e-2)
