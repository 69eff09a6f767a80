"""Weights come back bit for bit from every context that changes them, and what lies on disk is what was put there."""

import gc
import platform
import resource
import sys
from pathlib import Path

import pytest
import torch
from tiny_lms import save_checkpoint
from torch import nn

from sae.device import trim_memory
from sae.errors import UserError
from sae.lm.load import load_lm
from sae.lm.matrices import Matrix, Part, Slice
from sae.lm.weights import plain_parameters
from sae.weights.edit import only, replaced, rewritten
from sae.weights.mitigate.choose import put_back as put_model_back
from sae.weights.perturbation.regions import edited, regions
from sae.weights.restore import Marked, Whole, put_back
from sae.weights.stored import Stored

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is resident is read from /proc")


def odd_parameters():
    """One that is plain, a view of it in another order, the same once more, one that copies of it overlap, odd bits."""
    plain = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    bits = torch.tensor([[0x7FC01234, -0x80000000, 1, 0x7F800000], [0x3F800001, -1, 0x00400000, 7]], dtype=torch.int32)
    return {
        "plain": plain,
        "turned": nn.Parameter(plain.data.T),
        "tied": plain,
        "part": nn.Parameter(plain.data[1:3, ::2]),
        "bits": nn.Parameter(bits.view(torch.float32)),
        "half": nn.Parameter(torch.randn(3, 5).bfloat16()),
    }


def bits_of(parameters):
    return {name: one.detach().clone().contiguous().view(torch.uint8) for name, one in parameters.items()}


def same(found, expected):
    return all(torch.equal(found[name], values) for name, values in expected.items())


def matrices_of(parameters):
    return [Matrix(name, 0, "", one, 0) for name, one in parameters.items()]


def marks_of(parameters):
    return {name: torch.rand(one.shape) < 0.6 for name, one in parameters.items()}


def others(parameters):
    return {name: torch.randn(one.shape).to(one.dtype) for name, one in parameters.items()}


def halves(parameters):
    return regions([Part("row", 0, 0, (Slice(name, 0, 0, 1), Slice(name, 1, 1, 2))) for name in parameters])


CONTEXTS = {
    "rewritten": lambda own: rewritten(matrices_of(own), others(own)),
    "rewritten, kept on disk": lambda own: rewritten(matrices_of(own), others(own), keep=Stored),
    "zero": lambda own: replaced(matrices_of(own), marks_of(own), "zero"),
    "mean": lambda own: replaced(matrices_of(own), marks_of(own), "mean"),
    "restore": lambda own: replaced(matrices_of(own), marks_of(own), "restore", others(own)),
    "only": lambda own: only(matrices_of(own), marks_of(own)),
    "edited": lambda own: edited(own, halves(own), lambda region, values: values + 1),
    "plain": put_back,
}


def spoil(parameters):
    with torch.no_grad():
        for one in parameters.values():
            one.mul_(3).add_(0.1)


@pytest.mark.parametrize("inner", CONTEXTS)
@pytest.mark.parametrize("outer", ["rewritten", "edited"])
def test_odd_parameters_come_back_from_nested_blocks_that_fail(inner, outer):
    own = odd_parameters()
    before = bits_of(own)

    def changed_and_failing(between):
        with CONTEXTS[inner](own):
            if inner == "plain":
                spoil(own)
            assert not same(bits_of(own), between)
            raise KeyError

    def around():
        with CONTEXTS[outer](own):
            between = bits_of(own)
            assert not same(between, before)
            with pytest.raises(KeyError):
                changed_and_failing(between)
            assert same(bits_of(own), between)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        around()
    assert same(bits_of(own), before)


def test_an_edit_that_fails_halfway_is_undone():
    own = odd_parameters()
    before = bits_of(own)
    wrong = others(own) | {"bits": torch.zeros(3, 7)}
    with pytest.raises(RuntimeError), rewritten(matrices_of(own), wrong):
        raise AssertionError
    with pytest.raises(KeyError), rewritten(matrices_of(own), others(own) | {"none": torch.zeros(1)}):
        raise AssertionError
    assert same(bits_of(own), before)


def test_one_that_cannot_be_written_keeps_no_other_from_coming_back():
    class Broken(Whole):
        def put(self, tensor, values):
            raise OSError("no more")

    own = {name: nn.Parameter(torch.full((2,), float(number))) for number, name in enumerate("abc")}

    def run():
        with put_back(own, [Whole("a"), Broken("b"), Marked("c", torch.tensor([True, False]))]):
            spoil(own)

    with pytest.raises(OSError, match="no more"):
        run()
    assert own["a"].tolist() == [0, 0]
    assert own["c"].tolist() == [2, pytest.approx(6.1)]  # the second value was not named


def test_flags_and_gradients_come_back_too():
    own = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2), requires_grad=False)}
    mine = own["a"].grad = torch.tensor([1.0, 2.0])
    with put_back(own) as kept:
        assert own["a"].grad is None
        own["b"].requires_grad_(True)
        (own["a"] * own["b"]).sum().backward()
        own["a"].requires_grad_(False)
        assert [kept[number].tolist() for number in range(2)] == [[1, 1], [1, 1]]
    assert own["a"].grad is mine
    assert mine.tolist() == [1, 2]
    assert own["b"].grad is None
    assert [one.requires_grad for one in own.values()] == [True, False]


def test_a_model_with_tied_weights_comes_back(tmp_path):
    lm = load_lm(str(save_checkpoint(tmp_path, "gpt2")), device="cpu")
    batch = lm.tokenize(["hello there"])
    head = lm.bridge.original_model.get_output_embeddings().original_component.weight
    before, own = lm.logits(batch), plain_parameters(lm)

    def spoiled():
        with put_model_back(lm) as kept:
            assert kept.keys() == own.keys()
            spoil(own)
            with put_model_back(lm) as spoilt:
                assert not same(spoilt, kept)
                spoil(own)
                assert not torch.equal(lm.logits(batch), before)
                raise RuntimeError

    with pytest.raises(RuntimeError):
        spoiled()
    assert torch.equal(lm.logits(batch), before)
    assert head is lm.bridge.embed.original_component.weight


def test_what_is_stored_is_what_was_given_and_stays_so(tmp_path):
    given = {
        "odd": odd_parameters()["bits"].detach(),
        "turned": torch.randn(40, 300).T,
        "half": torch.randn(3, 5).bfloat16(),
        "marks": torch.rand(7, 3) < 0.5,
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    kept = Stored(given.items(), tmp_path / "new")
    assert list(kept) == list(given)
    for name, values in given.items():
        found = kept[name]
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        assert torch.equal(found.flatten().view(torch.uint8), values.contiguous().flatten().view(torch.uint8))
    kept["half"].zero_()
    assert torch.equal(kept["half"], given["half"])
    last = kept["turned"]
    assert list((tmp_path / "new").iterdir()) == []  # nothing to be left behind
    del kept
    gc.collect()
    assert torch.equal(last, given["turned"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept in"):
        Stored([], tmp_path / "file")
    with pytest.raises(ValueError, match="comes twice"):
        Stored([("a", last), ("a", last)], tmp_path)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@linux
def test_what_is_stored_is_in_memory_only_while_it_is_looked_at():
    n, size = 64, 2**20  # 64 matrices of 4 MiB
    kept = Stored((number, torch.full((size,), float(number))) for number in range(n))
    trim_memory()
    before, most = resident(), 0
    for number in range(n):
        assert float(kept[number].sum(dtype=torch.float64)) == number * size
        most = max(most, resident() - before)
    assert most < 4 * n * size / 4
    held = [kept[number] for number in range(n)]
    assert sum(float(one.sum(dtype=torch.float64)) for one in held) == size * n * (n - 1) / 2
    assert resident() - before > 4 * n * size / 2  # which is seen where they are


@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_freed_memory_between_pieces_in_use_is_given_back():
    pieces = [torch.ones(8 * 1024) for _ in range(2048)]  # 64 MiB in pieces too small to be mapped one by one
    left = pieces[::16]
    del pieces
    before = resident()
    trim_memory()
    assert before - resident() > 32 * 2**20
    assert all(float(one.sum()) == 8 * 1024 for one in left)
