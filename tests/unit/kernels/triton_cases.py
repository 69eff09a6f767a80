"""Every Triton operation against its definition, in Triton's interpreter: `test_triton.py` runs this file by itself.

Products are of small integers, so that they are exact in any order and selections can be compared bit by bit.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels import moments as moment_formats
from sae.kernels import triton
from sae.kernels.moments import Moments
from sae.kernels.operands import Entries, Index, Precision, Projection
from sae.kernels.reference import AdamStep, Kernels
from sae.kernels.triton import TritonKernels

REFERENCE, TRITON = Kernels(), TritonKernels()
DENSE = [Precision.float32, Precision.bfloat16]


def whole_numbers(generator, *shape, size=4):
    return torch.randint(-size, size + 1, shape, generator=generator).float()


def make_projection(batch, d_in, d_sae, precision=Precision.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centred, w_enc = whole_numbers(generator, batch, d_in), whole_numbers(generator, d_sae, d_in)
    return Projection(centred, w_enc.t(), whole_numbers(generator, d_sae) / 8, precision)


def make_index(batch, d_sae, density, seed=0, dense_latent=None):
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(batch, d_sae, generator=generator) < density
    if dense_latent is not None:
        on[:, dense_latent] = True
    rows, cols = on.nonzero(as_tuple=True)
    return Index(rows, cols, batch, d_sae), torch.randn(len(rows), generator=generator)


def truth(projection):
    """Pre-activations from a product in the projection's precision; exact apart from the result's rounding."""
    product = (projection.centred.double() @ projection.w_enc.double()).to(projection.precision.dtype)
    return product.float() + projection.b_enc


def assert_largest(entries: Entries, pre_acts, k):
    """Exactly the k largest of each row, at rising columns, each with its value."""
    batch = len(pre_acts)
    assert entries.rows.tolist() == [row for row in range(batch) for _ in range(k)]
    cols, values = entries.cols.view(batch, k), entries.values.view(batch, k)
    assert (cols[:, 1:] > cols[:, :-1]).all()
    assert torch.equal(values, pre_acts.gather(1, cols))
    assert torch.equal(values.sort(descending=True).values, pre_acts.topk(k).values)


@pytest.mark.parametrize("precision", DENSE)
def test_pre_acts_in_chunks(precision, monkeypatch):
    projection = make_projection(5, 7, 9, precision)
    monkeypatch.setattr(triton, "PRODUCT_BYTES", 80)
    assert torch.equal(TRITON.pre_acts(projection), truth(projection))


@pytest.mark.parametrize("precision", DENSE)
@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k"), [(1, 3, 20, 1), (9, 5, 37, 6), (2, 4, 11, 11), (2, 5, 70, 40), (1, 1, 1, 1)]
)
def test_topk(precision, batch, d_in, d_sae, k):
    projection = make_projection(batch, d_in, d_sae, precision)
    assert_largest(TRITON.topk(projection, k), truth(projection), k)


def test_topk_in_chunks(monkeypatch):
    projection = make_projection(5, 3, 24)
    monkeypatch.setattr(triton, "PRODUCT_BYTES", 200)
    assert_largest(TRITON.topk(projection, 4), truth(projection), 4)


def test_topk_of_ties_takes_the_first():
    projection = make_projection(2, 3, 40)
    projection = projection._replace(w_enc=torch.zeros(40, 3).t(), b_enc=torch.zeros(40))
    assert TRITON.topk(projection, 5).cols.tolist() == [0, 1, 2, 3, 4] * 2


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 10), st.integers(1, 9), st.integers(1, 300), st.sampled_from(list(Precision)), st.data())
def test_selections_of_any_shape(batch, d_in, d_sae, precision, data):
    k = data.draw(st.integers(1, min(d_sae, 20)))
    projection = make_projection(batch, d_in, d_sae, precision, seed=d_sae)
    # Rescored or not: products of at most 144 and biases of eighths are exact in bf16 apart from the bias.
    assert_largest(TRITON.topk(projection, k), truth(projection), k)
    threshold = torch.tensor(data.draw(st.sampled_from([-200.0, 0.0, 3.5, 20.0, 200.0])))
    for got, want in zip(TRITON.above(projection, threshold), REFERENCE.above(projection, threshold), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of infinities in rows after the last one
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.sampled_from([-torch.inf, -1e38, -2.0, -1e-40, -0.0, 0.0, 1.0, 1.0000001, 3e38, torch.inf]),
        min_size=1,
        max_size=30,
    ),
    data=st.data(),
)
def test_topk_orders_all_floats(values, data):
    k = data.draw(st.integers(1, len(values)))
    projection = Projection(torch.zeros(1, 2), torch.zeros(len(values), 2).t(), torch.tensor(values))
    assert_largest(TRITON.topk(projection, k), projection.b_enc[None], k)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("place", ["centred", "w_enc", "b_enc"])
def test_nan_is_shown(precision, place):
    projection = make_projection(3, 4, 50, precision)
    tensor = getattr(projection, place).clone()
    tensor.select(tensor.ndim - 1, 2).fill_(torch.nan)
    spoilt = projection._replace(**{place: tensor})
    assert TRITON.topk(spoilt, 3).values.view(3, 3).isnan().any(1).all()
    above = TRITON.above(spoilt, torch.tensor(0.5))
    assert above.rows[above.values.isnan()].unique().tolist() == [0, 1, 2]


def test_topk_falls_back_when_rows_are_too_long(monkeypatch):
    projection = make_projection(3, 4, 50)
    monkeypatch.setattr(triton, "LARGEST_TILE", 4)
    assert_largest(TRITON.topk(projection, 5), truth(projection), 5)
    rescored = TRITON.topk(projection._replace(precision=Precision.bfloat16_rescored), 5)
    assert_largest(rescored, truth(projection), 5)


@pytest.mark.parametrize("batch", [1, 3])
def test_rescored_topk_equals_that_of_fp32(batch):
    # Products 256 to 293, of which bf16 holds every other one: of equal ones it takes the first, which is the smaller.
    w_enc = torch.stack([torch.full((38,), 256.0), torch.arange(38.0)], 1)
    projection = Projection(torch.ones(batch, 2), w_enc.t(), torch.zeros(38), Precision.bfloat16_rescored)
    exact = truth(projection._replace(precision=Precision.float32))
    rounded = TRITON.topk(projection._replace(precision=Precision.bfloat16), 2)
    assert set(rounded.cols.tolist()) == {35, 36}
    assert_largest(TRITON.topk(projection, 2), exact, 2)


def test_group_sizes():
    assert triton._group_size(65536, 64) == 32
    assert triton._group_size(24, 24) == 32
    assert triton._group_size(2**20, 2**12) is None


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize(("batch", "d_sae", "limit"), [(9, 13, 200), (1, 1030, 60), (3, 20, 4000)])
def test_above(precision, per_latent, batch, d_sae, limit, monkeypatch):
    monkeypatch.setattr(triton, "PRODUCT_BYTES", limit * d_sae)
    projection = make_projection(batch, 3, d_sae, precision)
    threshold = torch.tensor(10.0) + per_latent * torch.arange(d_sae) / d_sae
    found, expected = TRITON.above(projection, threshold), REFERENCE.above(projection, threshold)
    assert 0 < len(expected.rows) < batch * d_sae
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_above_with_nothing_or_too_much_above():
    projection = make_projection(4, 3, 20)
    assert len(TRITON.above(projection, torch.tensor(1e9)).rows) == 0
    assert TRITON.above(projection, torch.tensor(-1e9), max_density=0.99) is None
    rescored = projection._replace(precision=Precision.bfloat16_rescored)
    assert TRITON.above(rescored, torch.tensor(-1e9), max_density=0.6) is None
    assert len(TRITON.above(rescored, torch.tensor(-1e9)).rows) == 80


def test_rescoring_adds_what_rounding_hid():
    # 259 is 260 or 258 in bf16; the threshold lies between.
    projection = Projection(
        torch.tensor([[259.0]]), torch.tensor([[1.0], [0.0]]).t(), torch.zeros(2), Precision.bfloat16_rescored
    )
    for threshold, n in ((258.5, 1), (259.5, 0)):
        found = TRITON.above(projection, torch.tensor(threshold))
        assert found.values.tolist() == [259.0] * n


@pytest.mark.parametrize("d_sae", [6, 70000])
def test_by_latent(d_sae):
    index, _ = make_index(7, 6, 0.4, dense_latent=2)
    index.d_sae = d_sae
    for got, want in zip(TRITON.by_latent(index), REFERENCE.by_latent(index), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "density"),
    [(1, 1, 1, 1.0), (6, 5, 7, 0.3), (3, 70, 9, 0.9), (4, 3, 5, 0.0), (1, 6, 40, 1)],
)
def test_decode_and_gradients(batch, d_in, d_sae, density):
    index, acts = make_index(batch, d_sae, density)
    check_sums(index, acts, d_in)


@pytest.mark.parametrize("batch", [11, 12])
def test_latents_with_very_many_tokens(batch, monkeypatch):
    # A latent's entries are summed in parts of 2, by several programs.
    monkeypatch.setattr(triton, "PART", 2)
    monkeypatch.setattr(triton, "MOST_PARTS", 1000)
    for dense_latent in range(4):
        check_sums(*make_index(batch, 4, 0.2, seed=batch, dense_latent=dense_latent), d_in=3)
    check_sums(*make_index(batch, 2, 1.0), d_in=3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 100), st.integers(1, 20), st.floats(0, 1), st.integers(1, 5))
def test_sums_of_any_shape(batch, d_in, d_sae, density, part):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton, "PART", 2**part)
        check_sums(*make_index(batch, d_sae, density, seed=d_in), d_in)


def test_slices_of_wide_rows(monkeypatch):
    monkeypatch.setattr(triton, "L2_SHARE", 0)
    check_sums(*make_index(3, 5, 0.5), d_in=130)


def check_sums(index, acts, d_in):
    generator = torch.Generator().manual_seed(1)
    w_dec, b_dec = torch.randn(index.d_sae, d_in, generator=generator), torch.randn(d_in, generator=generator)
    vectors = torch.randn(index.batch, d_in, generator=generator)
    groups = REFERENCE.by_latent(index)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        TRITON.decode(acts, index, w_dec, b_dec), REFERENCE.decode(acts, index, w_dec, b_dec), **close
    )
    found = TRITON.decode_grads(vectors, acts, index, groups, w_dec)
    expected = REFERENCE.decode_grads(vectors, acts, index, groups, w_dec)
    torch.testing.assert_close(found.acts, expected.acts, **close)
    torch.testing.assert_close(found.w_dec, expected.w_dec, **close)
    torch.testing.assert_close(TRITON.bias_grad(acts, index, groups), REFERENCE.bias_grad(acts, index, groups), **close)
    torch.testing.assert_close(
        TRITON.encode_grad(acts, index, groups, vectors), REFERENCE.encode_grad(acts, index, groups, vectors), **close
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 6), (2, 48), (2, 5000)])
def test_row_norms(shape):
    generator = torch.Generator().manual_seed(0)
    grad, rows = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    for unit_rows in (None, rows):
        found, expected = TRITON.row_norms(grad, unit_rows), REFERENCE.row_norms(grad, unit_rows)
        assert found.square_sum.dtype == torch.float64
        torch.testing.assert_close(found.square_sum, expected.square_sum, rtol=1e-6, atol=1e-12)
        if unit_rows is None:
            assert found.along is None
        else:
            torch.testing.assert_close(found.along, expected.along, rtol=1e-5, atol=1e-6)


def test_row_norms_fall_back_when_rows_are_too_long(monkeypatch):
    monkeypatch.setattr(triton, "LARGEST_TILE", 4)
    test_row_norms((2, 9))


def test_row_tiles():
    assert [triton._row_tiles(d)[:2] for d in (1, 3, 7, 64, 768, 2304, 4608, 5120)] == [
        (1, 0),
        (2, 1),
        (8, 0),
        (64, 0),
        (512, 256),
        (2048, 256),
        (4096, 512),
        (4096, 1024),
    ]


def run_adam(kernels, kind, unit, beta1, shape, n_steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator)
    if unit:
        param /= param.norm(dim=1, keepdim=True)
    moments = Moments.zeros(kind, param)
    for number in range(1, n_steps + 1):
        grad = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 2, shape, generator=generator)
        along = (grad * param).sum(1) if unit else None
        step = AdamStep(lr=1e-2, beta1=beta1, beta2=0.99, eps=1e-8, step=number, seed=7)
        kernels.adam(param, grad, moments, step, torch.tensor(0.5), along)
    return param, moments


@pytest.mark.parametrize("kind", moment_formats.KINDS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("beta1", "shape"), [(0.9, (3, 6)), (0.0, (2, 129))])
def test_adam(kind, unit, beta1, shape):
    param, moments = run_adam(TRITON, kind, unit, beta1, shape)
    expected_param, expected = run_adam(REFERENCE, kind, unit, beta1, shape)
    # Products may be fused with sums, or not: the last bit differs, and one rounding in 2^16 (bf16) or 2^20 (8 bits).
    torch.testing.assert_close(param, expected_param, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(moments.read(), expected.read(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30)
    if unit:
        torch.testing.assert_close(param.norm(dim=1), torch.ones(len(param)))


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 2**40), st.integers(1, 10**6), st.integers(1, 40), st.integers(1, 3))
def test_stochastic_rounding_bit_by_bit(kind, seed, number, d, rows):
    # Halves of numbers of 11 bits and of their squares are exact, however products and sums are fused.
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-2047, 2048, (rows, d), generator=generator).float()
    grad = size * 2.0 ** torch.randint(-20, 1, (rows, d), generator=generator)
    step = AdamStep(lr=1e-3, beta1=0.5, beta2=0.5, eps=1e-8, step=number, seed=seed)
    results = []
    for kernels in (TRITON, REFERENCE):
        moments = Moments.zeros(kind, grad)
        kernels.adam(torch.zeros_like(grad), grad.clone(), moments, step, torch.tensor(1.0))
        results.append(moments.tensors())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_eight_bits_are_read_back_bit_by_bit():
    # Without a gradient and with nothing forgotten, moments are only decoded and encoded: no value may move.
    step = AdamStep(lr=0.0, beta1=0.5, beta2=0.5, eps=1e-8, step=1, seed=3)
    grad = torch.zeros(2, 256)
    results = []
    for kernels in (TRITON, REFERENCE):
        moments = Moments.zeros("float8", grad)
        moments.exp_avg.copy_(torch.arange(256))
        moments.exp_avg_sq.copy_(torch.arange(256).clamp(max=31 * 8))
        moments.exp_avg_scale.fill_(3.0)
        moments.exp_avg_sq_scale.fill_(0.7)
        kernels.adam(torch.ones(2, 256), grad.clone(), moments, step, torch.tensor(1.0))
        results.append(moments.tensors())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_adam_falls_back_when_rows_are_too_long(monkeypatch):
    monkeypatch.setattr(triton, "LARGEST_TILE", 4)
    param, _ = run_adam(TRITON, "float8", True, 0.9, (2, 9))
    torch.testing.assert_close(param, run_adam(REFERENCE, "float8", True, 0.9, (2, 9))[0])


def test_max_density_is_small():
    assert 0 < TRITON.max_density(Precision.bfloat16) < TRITON.max_density(Precision.float32) < 1
