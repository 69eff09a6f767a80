"""Claims of the kernels that only show in corners: several chunks, what bf16 cannot hold, which bits round a moment."""

import pytest
import torch
from kernel_cases import FAST, as_matrix, projection

from sae.autoencoder.gradients import loss_and_gradients
from sae.autoencoder.sae import SAE, SAEConfig
from sae.kernels import pick
from sae.kernels.moments import Moments, step_seed
from sae.kernels.operands import Precision, Projection, Workspace
from sae.kernels.reference import AdamStep, Kernels

REFERENCE = Kernels()


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows a chunk."""
    monkeypatch.setattr("sae.kernels.cpu.CHUNK_BYTES", 1)
    monkeypatch.setattr("sae.kernels.cpu.CHUNK_ROWS", 3)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("batch", [9, 10])
def test_selection_over_several_chunks_names_the_right_tokens(name, precision, batch, small_chunks):
    kernels, given = pick("cpu", name), projection(batch, 24, 150, precision)
    truth = REFERENCE.pre_acts(given)
    exact = precision is not Precision.bfloat16
    close = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.01, "atol": 0.05}
    ordered = truth.flatten().sort().values
    tail = ordered[len(ordered) // 2 :]
    place = int(tail.diff().argmax())
    bar = tail[place] + tail.diff()[place] / 2  # in the widest gap, so that rounding cannot decide
    chosen = {
        "topk": (kernels.topk(given, 6), REFERENCE.topk(given, 6)),
        "above a number": (kernels.above(given, bar), REFERENCE.above(given, bar)),
        "above a vector": (kernels.above(given, bar.expand(150).clone()), REFERENCE.above(given, bar)),
    }
    assert int(chosen["above a number"][1].rows.max()) >= 3, "the test looks beyond the first chunk"
    for what, (found, expected) in chosen.items():
        torch.testing.assert_close(
            found.values, truth[found.rows, found.cols], **close, msg=lambda text, what=what: f"{what}: {text}"
        )
        if exact:
            mine, wanted = as_matrix(found, truth.shape), as_matrix(expected, truth.shape)
            torch.testing.assert_close(mine, wanted, **close, equal_nan=True)
    assert chosen["topk"][0].rows.tolist() == [token for token in range(batch) for _ in range(6)]


@pytest.mark.parametrize("name", FAST)
def test_too_dense_is_judged_over_all_chunks(name, small_chunks):
    """Nothing in the first chunks, everything in the last: a third of the matrix."""
    given = projection(9, 8, 50, Precision.float32)
    given.centred[:6], given.b_enc[:] = 0, 0
    given.centred[6:] = 1
    given.w_enc.copy_(given.w_enc.abs())
    bar, kernels = torch.tensor(1e-6), pick("cpu", name)
    assert kernels.above(given, bar, 0.3) is None
    found = kernels.above(given, bar, 0.4)
    assert found.rows.tolist() == [6] * 50 + [7] * 50 + [8] * 50


@pytest.mark.parametrize("name", FAST)
def test_a_bias_that_bfloat16_cannot_hold_is_not_lost(name):
    """The products are small whole numbers, which bf16 holds; the biases lie between its numbers."""
    generator = torch.Generator().manual_seed(0)
    centred = torch.randint(-1, 2, (5, 8), generator=generator).float()
    w_enc = torch.randint(-1, 2, (30, 8), generator=generator).float().t()
    bias = 90 + 4 * torch.rand(30, generator=generator)
    assert (bias.bfloat16().float() - bias).abs().max() > 0.1
    given = Projection(centred, w_enc, bias, Precision.bfloat16)
    kernels, truth = pick("cpu", name), REFERENCE.pre_acts(given)
    for found in (kernels.topk(given, 30), kernels.above(given, torch.tensor(0.0))):
        assert len(found.values) == 150
        torch.testing.assert_close(found.values, truth[found.rows, found.cols], rtol=0, atol=1e-4)


def moved(kernels, kind, step, seed, grads):
    """Moments after steps with these gradients; the betas of 0.5 make every product exact."""
    moments = Moments.zeros(kind, grads[0])
    for number, grad in enumerate(grads):
        adam = AdamStep(0.01, 0.5, 0.5, 1e-8, step + number, seed)
        kernels.adam(torch.zeros_like(grad), grad.clone(), moments, adam, torch.tensor(1.0))
    return moments


def whole_grads(n):
    """Whole numbers of 11 bits: exact in fp32 when squared and averaged, not in bf16."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (n, 33, 65), generator=generator) * 2 - 1
    return list((torch.randint(2**10, 2**11, (n, 33, 65), generator=generator) * signs).float())


@pytest.mark.parametrize("name", FAST)
def test_bfloat16_moments_have_the_same_bits_as_the_references(name):
    grads = whole_grads(4)
    mine, truth = (moved(kernels, "bfloat16", 1, 7, grads) for kernels in (pick("cpu", name), REFERENCE))
    assert torch.equal(mine.exp_avg, truth.exp_avg)
    assert torch.equal(mine.exp_avg_sq, truth.exp_avg_sq)


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_moments_are_rounded_differently_in_each_step_and_matrix(name, kind):
    """Noise that stayed the same would round an element always the same way: the mean would not be kept."""
    kernels, grads = pick("cpu", name), whole_grads(1)
    first = moved(kernels, kind, 1, 7, grads)
    again, next_step, other_matrix = (
        moved(kernels, kind, step, seed, grads) for step, seed in ((1, 7), (2, 7), (1, 8))
    )
    for part in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        for other in (next_step, other_matrix):
            changed = (getattr(first, part) != getattr(other, part)).float().mean()
            assert changed > 0.2


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_the_two_moments_are_rounded_independently(name):
    """A gradient of 1.5 * (1 + 2^-9) leaves a moment 3 / 8, its square 2 / 3 of the way between bf16 numbers."""
    grad = torch.full((64, 64), 1.5 * (1 + 2**-9))
    moments = moved(pick("cpu", name), "bfloat16", 1, 7, [grad])
    up = [tensor.float() == tensor.float().max() for tensor in (moments.exp_avg, moments.exp_avg_sq)]
    shares = [float(item.float().mean()) for item in up]
    assert all(0.2 < share < 0.9 for share in shares)
    both = float((up[0] & up[1]).float().mean())
    assert both == pytest.approx(shares[0] * shares[1], abs=0.05)


def test_equal_moments_are_not_rounded_alike():
    values = torch.full((64, 64), 1 + 2**-8)  # halfway
    moments = Moments.zeros("bfloat16", values)
    moments.write(values, values, step_seed(3, 1))
    assert 0.4 < float((moments.exp_avg == moments.exp_avg_sq).float().mean()) < 0.6


def test_step_seeds_do_not_repeat_and_leave_the_next_for_the_second_moment():
    seeds = [step_seed(matrix, step) for matrix in range(8) for step in range(1, 500)]
    assert len({*seeds, *(seed + 1 for seed in seeds)}) == 2 * len(seeds)
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


@pytest.mark.skipif("cpp" not in FAST, reason="no C++ compiler on this machine")
def test_gradients_use_the_memory_they_are_offered_again():
    """Two SAEs of different sizes that share a workspace get the gradients they would get alone."""
    workspace, kernels = Workspace(), pick("cpu", "cpp")
    alone, shared, places = [], [], set()
    for d_sae in (60, 90, 60):
        sae = SAE(SAEConfig("topk", 12, d_sae, 5, 0, "h", "toy"))
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(d_sae))
        loss_and_gradients(sae, x, 0, None, kernels=kernels)
        alone.append((sae.W_dec.grad.clone(), sae.W_enc.grad.clone()))
        loss_and_gradients(sae, x, 0, None, kernels=kernels, workspace=workspace)
        assert sae.W_dec.grad.data_ptr() != sae.W_enc.grad.data_ptr()
        shared.append((sae.W_dec.grad.clone(), sae.W_enc.grad.clone()))
        places.add(sae.W_dec.grad.data_ptr())
    assert len(places) == 2, "the third SAE uses the memory of the second"
    for mine, truth in zip(shared, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))
