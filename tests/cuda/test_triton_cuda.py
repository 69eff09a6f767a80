"""The Triton kernels compiled and run, at the size they are made for: the same truths as in the interpreter."""

import importlib.util

import pytest
import torch

from sae.kernels.moments import KINDS, Moments
from sae.kernels.operands import Entries, Index, Precision, Projection
from sae.kernels.reference import AdamStep, Kernels, topk_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

BATCH, D_IN, D_SAE, K = 4096, 2304, 65536, 64
REFERENCE = Kernels()


@pytest.fixture(scope="module")
def kernels():
    from sae.kernels.triton import TritonKernels

    return TritonKernels()


@pytest.fixture(scope="module")
def generator():
    return torch.Generator("cuda").manual_seed(0)


@pytest.fixture(scope="module")
def weights(generator):
    """W_enc transposed and W_dec: unit rows."""
    rows = torch.randn(2, D_SAE, D_IN, device="cuda", generator=generator)
    return rows / rows.norm(dim=2, keepdim=True)


@pytest.fixture(scope="module")
def projection(weights, generator):
    centred = torch.randn(BATCH, D_IN, device="cuda", generator=generator)
    bias = 0.1 * torch.randn(D_SAE, device="cuda", generator=generator)
    return Projection(centred, weights[0].t(), bias)


@pytest.fixture(scope="module")
def selected(kernels, projection):
    """Entries, with a latent that is active on every token; gradients or activations at them; the index."""
    cols = kernels.topk(projection, K).cols.view(BATCH, K)
    cols = torch.where((cols == 7).any(1, keepdim=True), cols, cols.clone().index_fill_(1, cols.new_tensor([3]), 7))
    cols = cols.sort(dim=1).values.reshape(-1)
    values = torch.randn(len(cols), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return Index(topk_rows(BATCH, K, cols.device), cols, BATCH, D_SAE), values


def close(found, expected, tolerance=1e-5):
    """Close relative to the largest value: sums of many terms of both signs."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_largest(entries: Entries, pre_acts, k):
    batch = len(pre_acts)
    cols, values = entries.cols.view(batch, k), entries.values.view(batch, k)
    assert torch.equal(entries.rows, topk_rows(batch, k, cols.device))
    assert (cols[:, 1:] > cols[:, :-1]).all()
    assert torch.equal(values, pre_acts.gather(1, cols))
    assert torch.equal(values.sort(descending=True).values, pre_acts.topk(k).values)


@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
@pytest.mark.parametrize("k", [1, K, 1152])
def test_topk(kernels, projection, precision, k):
    projection = projection._replace(precision=precision)
    assert_largest(kernels.topk(projection, k), kernels.pre_acts(projection), k)


@pytest.mark.parametrize("precision", list(Precision))
def test_topk_of_odd_sizes(kernels, precision):
    generator = torch.Generator("cuda").manual_seed(2)
    for batch, d_in, d_sae, k in ((1, 3, 5, 5), (3, 77, 1001, 10), (17, 130, 4099, 500)):
        # Small whole numbers: exact in bf16 too, and full of ties.
        centred, w_enc = (
            torch.randint(-1, 2, shape, device="cuda", generator=generator).float()
            for shape in ((batch, d_in), (d_sae, d_in))
        )
        projection = Projection(centred, w_enc.t(), torch.zeros(d_sae, device="cuda"), precision)
        assert_largest(kernels.topk(projection, k), centred @ w_enc.t(), k)


def test_topk_in_chunks(kernels, projection, monkeypatch):
    from sae.kernels import triton

    expected = kernels.topk(projection, K)
    monkeypatch.setattr(triton, "PRODUCT_BYTES", 2**28)
    found = kernels.topk(projection, K)
    assert (found.cols == expected.cols).float().mean() > 0.9999
    close(found.values, expected.values)


def test_topk_shows_nan(kernels, projection):
    for precision in Precision:
        bias = projection.b_enc.clone()
        bias[D_SAE - 1] = torch.nan
        centred = projection.centred.clone()
        centred[5, 5] = -torch.nan
        values = kernels.topk(Projection(projection.centred, projection.w_enc, bias, precision), K).values
        assert values.view(BATCH, K).isnan().any(1).all()
        values = kernels.topk(Projection(centred, projection.w_enc, projection.b_enc, precision), K).values
        assert values.view(BATCH, K).isnan().any(1).nonzero().tolist() == [[5]]


def test_rescored_topk_is_that_of_fp32(kernels, projection):
    expected = kernels.topk(projection, K)
    found = kernels.topk(projection._replace(precision=Precision.bfloat16_rescored), K)
    plain = kernels.topk(projection._replace(precision=Precision.bfloat16), K)

    def common(entries):
        ours, theirs = (item.cols + item.rows * D_SAE for item in (entries, expected))
        return torch.isin(ours, theirs).float().mean()

    assert common(found) > 0.999
    assert common(found) > common(plain)
    close(found.values.view(BATCH, K).sum(1), expected.values.view(BATCH, K).sum(1), 1e-4)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("per_latent", [False, True])
def test_above(kernels, projection, precision, per_latent):
    projection = projection._replace(precision=precision)
    threshold = torch.full((D_SAE,) if per_latent else (), 3.0, device="cuda")
    found = kernels.above(projection, threshold)
    if precision is not Precision.bfloat16_rescored:
        pre_acts = kernels.pre_acts(projection)
        rows, cols = (pre_acts > threshold).nonzero(as_tuple=True)
        for got, want in zip(found, (rows, cols, pre_acts[rows, cols]), strict=True):
            assert torch.equal(got, want)
    else:
        exact = kernels.above(projection._replace(precision=Precision.float32), threshold)
        ours, theirs = (item.cols + item.rows * D_SAE for item in (found, exact))
        assert torch.isin(theirs, ours).float().mean() > 0.9999
        assert torch.isin(ours, theirs).float().mean() > 0.9999
    assert kernels.above(projection, threshold, max_density=1e-5) is None
    assert len(kernels.above(projection, threshold + 1e6).rows) == 0


def test_by_latent(kernels, selected):
    index, _ = selected
    for got, want in zip(kernels.by_latent(index), REFERENCE.by_latent(index), strict=True):
        assert torch.equal(got, want)


def test_decode_and_gradients(kernels, selected, weights, projection, generator):
    index, acts = selected
    b_dec, grad = projection.b_enc[:D_IN].clone(), torch.randn(BATCH, D_IN, device="cuda", generator=generator)
    groups = kernels.by_latent(index)
    close(kernels.decode(acts, index, weights[1], b_dec), REFERENCE.decode(acts, index, weights[1], b_dec))
    found = kernels.decode_grads(grad, acts, index, groups, weights[1])
    expected = REFERENCE.decode_grads(grad, acts, index, groups, weights[1])
    close(found.acts, expected.acts)
    close(found.w_dec, expected.w_dec)
    again = kernels.decode_grads(grad, acts, index, groups, weights[1])
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    close(
        kernels.encode_grad(acts, index, groups, projection.centred),
        REFERENCE.encode_grad(acts, index, groups, projection.centred),
    )


@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 1, 1), (7, 77, 13), (700, 300, 9), (3, 2304, 5000)])
def test_sums_of_odd_sizes(kernels, batch, d_in, d_sae):
    generator = torch.Generator("cuda").manual_seed(3)
    rows, cols = (torch.rand(batch, d_sae, device="cuda", generator=generator) < 0.7).nonzero(as_tuple=True)
    index = Index(rows, cols, batch, d_sae)
    acts = torch.randn(len(rows), device="cuda", generator=generator)
    w_dec, grad = (torch.randn(n, d_in, device="cuda", generator=generator) for n in (d_sae, batch))
    groups = kernels.by_latent(index)
    expected = REFERENCE.decode_grads(grad, acts, index, groups, w_dec)
    found = kernels.decode_grads(grad, acts, index, groups, w_dec)
    if len(rows):
        close(found.acts, expected.acts)
    torch.testing.assert_close(found.w_dec, expected.w_dec, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kernels.decode(acts, index, w_dec, grad[0]), REFERENCE.decode(acts, index, w_dec, grad[0]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(D_SAE, D_IN), (1, D_SAE), (33, 77)])
def test_row_norms(kernels, generator, shape):
    grad, rows = torch.randn(2, *shape, device="cuda", generator=generator)
    found, expected = kernels.row_norms(grad), REFERENCE.row_norms(grad)
    torch.testing.assert_close(found.square_sum, expected.square_sum, rtol=1e-9, atol=0)
    rows /= rows.norm(dim=1, keepdim=True)
    found, expected = kernels.row_norms(grad, rows), REFERENCE.row_norms(grad, rows)
    torch.testing.assert_close(found.square_sum, expected.square_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.along, expected.along, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(8192, D_IN), (33, 77), (4, 16384)])
def test_adam(kernels, kind, unit, shape):
    results = []
    for version in (kernels, REFERENCE):
        generator = torch.Generator("cuda").manual_seed(4)
        param = torch.randn(shape, device="cuda", generator=generator)
        param /= param.norm(dim=1, keepdim=True)
        moments = Moments.zeros(kind, param)
        for number in (1, 2):
            grad = torch.randn(shape, device="cuda", generator=generator)
            grad *= 10.0 ** torch.randint(-3, 2, shape, device="cuda", generator=generator)
            along = (grad * param).sum(1) if unit else None
            step = AdamStep(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, step=number, seed=5)
            version.adam(param, grad, moments, step, torch.tensor(0.5, device="cuda"), along)
        results.append((param, moments))
    (param, moments), (expected_param, expected) = results
    different = ((param - expected_param).abs() > 1e-5).float().mean()
    assert different < 1e-4
    for name, tensor in moments.tensors().items():
        other = expected.tensors()[name]
        if tensor.dtype == torch.float32:
            close(tensor, other)
        else:
            # The last bit of fp32, where products are fused with sums or not, moves one rounding in thousands.
            assert (tensor != other).float().mean() < 1e-3, name


def test_the_host_never_waits(kernels, projection, selected, weights, generator):
    index, acts = selected
    grad = torch.randn(BATCH, D_IN, device="cuda", generator=generator)
    param, clip = weights[0].clone(), torch.ones((), device="cuda")
    moments = {kind: Moments.zeros(kind, param) for kind in KINDS}

    def step():
        for precision in Precision:
            kernels.topk(projection._replace(precision=precision), K)
        groups = kernels.by_latent(index)
        kernels.decode(acts, index, weights[1], grad[0])
        kernels.decode_grads(grad, acts, index, groups, weights[1])
        w_grad = kernels.encode_grad(acts, index, groups, projection.centred)
        along = kernels.row_norms(w_grad, param).along
        for kind in KINDS:
            kernels.adam(param, w_grad, moments[kind], AdamStep(1e-3, 0.9, 0.999, 1e-8, 1, 0), clip, along)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
