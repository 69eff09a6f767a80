"""Foreign files give tensors or a sentence; what is in them never runs."""

import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from sae.errors import UserError
from sae.formats.tensors import PICKLES, flatten, pick, read, read_pickle


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (Path(self.canary), "ran")


def zipped(value, path):
    torch.save(value, path)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [zipped, legacy, bare])
@pytest.mark.parametrize("suffix", PICKLES)
@pytest.mark.parametrize("place", ["alone", "beside", "within"])
def test_code_in_a_pickle_does_not_run(tmp_path, suffix, write, place):
    canary, path = tmp_path / "canary", tmp_path / f"ae{suffix}"
    bomb = Bomb(canary)
    weights = {"W_enc": torch.ones(2, 3)}
    write({"alone": bomb, "beside": weights | {"W_dec": bomb}, "within": {"state": {"list": [bomb]}}}[place], path)
    for opens in (read, read_pickle):
        with pytest.raises(UserError, match=r"could run code|is damaged"):
            opens(path)
    assert not canary.exists()
    # The bomb is a live one.
    if write is bare:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.read_text() == "ran"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_code_under_another_name_does_not_run(tmp_path, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"params{suffix}"
    zipped({"W_enc": Bomb(canary)}, path)
    with pytest.raises(UserError):
        read(path)
    bare(Bomb(canary), path)
    with pytest.raises(UserError):
        read(path)
    assert not canary.exists()


def test_objects_in_an_npz_do_not_run(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "params.npz"
    np.savez(path, W_enc=np.array([Bomb(canary)], dtype=object))
    with pytest.raises(UserError, match="more than numbers"):
        read(path)
    assert not canary.exists()
    assert np.load(path, allow_pickle=True)["W_enc"] is not None
    assert canary.exists()


@pytest.mark.parametrize("suffix", PICKLES)
@pytest.mark.parametrize("write", [zipped, legacy])
def test_tensors_of_a_pickle_are_read(tmp_path, suffix, write):
    path = tmp_path / f"ae{suffix}"
    weights = torch.arange(6.0).view(2, 3)
    write({"state": {"W_enc": weights, "k": 3}, "names": ["a"]}, path)
    found = read(path)
    assert list(found) == ["state.W_enc"]
    assert torch.equal(found["state.W_enc"], weights)


@pytest.mark.parametrize("suffix", [*PICKLES, ".npz", ".safetensors"])
def test_damaged_files_give_a_sentence(tmp_path, suffix):
    path = tmp_path / f"ae{suffix}"
    if suffix == ".npz":
        np.savez(path, W_enc=np.ones((40, 40)))
    elif suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"W_enc": torch.ones(40, 40)}, path)
    else:
        zipped({"W_enc": torch.ones(40, 40)}, path)
    whole = path.read_bytes()
    read(path)
    for kept in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"damaged|truncated|could run code"):
            read(path)
    path.unlink()
    with pytest.raises(UserError, match="no file"):
        read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("suffix", "write"), [(".pt", zipped), (".pt", legacy), (".pt", bare), (".npz", None)])
def test_whatever_is_damaged_it_is_a_sentence(tmp_path, suffix, write):
    """Bytes overwritten at random: the file is read, or refused as the user's to mend."""
    path, random, refused = tmp_path / f"ae{suffix}", Random(0), 0
    if write is None:
        np.savez(path, W_enc=np.ones((2, 3)))
    else:
        write({"a": [1, 2.0, "x"]} if write is bare else {"W_enc": torch.ones(2, 3), "k": {"l": 3}}, path)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 2, 5))):
            damaged[random.randrange(len(whole))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except UserError:
            refused += 1
    assert refused > 20


def test_pick_names_what_is_missing_or_not_finite(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.ones(2, dtype=torch.bfloat16)}
    assert [tensor.dtype for tensor in pick(tensors, tmp_path, "c", "a")] == [torch.float32] * 2
    with pytest.raises(UserError, match=r"'W_enc' is missing .* has a, b, c"):
        pick(tensors, tmp_path, "a", "W_enc")
    with pytest.raises(UserError, match=r"'b' .* not finite"):
        pick(tensors, tmp_path, "b")


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_other_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "ae.gguf").write_text("x")
    with pytest.raises(UserError, match="convert it"):
        read(tmp_path / "ae.gguf")
