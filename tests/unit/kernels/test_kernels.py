"""Every kernel agrees with the reference, whatever the shapes; selection and moments have the properties they claim."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FAST, as_matrix, projection

from sae.errors import UserError
from sae.kernels import pick, pick_precision
from sae.kernels.moments import KINDS, Moments, decode8, encode8, random_bits, round_bfloat16
from sae.kernels.operands import Index, Precision
from sae.kernels.reference import AdamStep, Kernels

REFERENCE = Kernels()

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 300))


@pytest.mark.parametrize("name", FAST)
@given(shapes, st.integers(0, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_selection(name, shape, seed, data):
    batch, _, d_sae = shape
    kernels, given_ = pick("cpu", name), projection(*shape, seed=seed)
    k = data.draw(st.integers(1, d_sae))
    found = as_matrix(kernels.topk(given_, k), (batch, d_sae))
    expected = as_matrix(REFERENCE.topk(given_, k), (batch, d_sae))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    pre_acts = REFERENCE.pre_acts(given_)
    torch.testing.assert_close(kernels.pre_acts(given_), pre_acts, rtol=1e-5, atol=1e-5)
    # A threshold halfway between two values, so that rounding cannot decide.
    ordered = pre_acts.flatten().sort().values
    gaps = ordered.diff()
    bar = ordered[int(gaps.argmax())] + gaps.max() / 2 if len(gaps) else ordered[0] - 1
    for threshold in (bar, bar.expand(d_sae).clone()):
        found = as_matrix(kernels.above(given_, threshold), (batch, d_sae))
        torch.testing.assert_close(
            found, pre_acts.where(pre_acts > bar, torch.nan), rtol=1e-5, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("name", FAST)
@given(shapes, st.integers(0, 5), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_sums_and_gradients(name, shape, seed, density):
    batch, d_in, d_sae = shape
    kernels = pick("cpu", name)
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.rand(batch, d_sae, generator=generator) < density).nonzero(as_tuple=True)
    index = Index(rows, cols, batch, d_sae)
    acts = torch.randn(len(rows), generator=generator)
    w_dec, b_dec = torch.randn(d_sae, d_in, generator=generator), torch.randn(d_in, generator=generator)
    grad = torch.randn(batch, d_in, generator=generator)
    groups, expected_groups = kernels.by_latent(index), REFERENCE.by_latent(index)
    for found, expected in zip(groups, expected_groups, strict=True):
        assert torch.equal(found, expected)
    arguments = (index, groups)
    close = {"rtol": 1e-4, "atol": 1e-4}
    decoded = REFERENCE.decode(acts, index, w_dec, b_dec)
    torch.testing.assert_close(kernels.decode(acts, index, w_dec, b_dec), decoded, **close)
    found = kernels.decode_grads(grad, acts, *arguments, w_dec)
    for mine, truth in zip(found, REFERENCE.decode_grads(grad, acts, *arguments, w_dec), strict=True):
        torch.testing.assert_close(mine, truth, **close)
    torch.testing.assert_close(kernels.bias_grad(acts, *arguments), REFERENCE.bias_grad(acts, *arguments), **close)
    truth = REFERENCE.encode_grad(acts, *arguments, grad)
    torch.testing.assert_close(kernels.encode_grad(acts, *arguments, grad), truth, **close)


@pytest.mark.parametrize("name", FAST)
def test_forward_and_gradients_at_full_width(name):
    """Forward within 1e-5 and gradients within 1e-4, relative to the largest element, at a real SAE's size."""
    given_ = projection(256, 512, 4096)
    kernels = pick("cpu", name)
    found = kernels.topk(given_, 32)
    index = Index(found.rows, found.cols, 256, 4096)
    groups = kernels.by_latent(index)
    w_dec, b_dec = given_.w_enc.t().contiguous(), torch.randn(512)
    grad = torch.randn(256, 512)

    def distance(mine, truth):
        return float((mine - truth).abs().max() / truth.abs().max())

    values = REFERENCE.pre_acts(given_)[found.rows, found.cols]
    assert distance(found.values, values) < 1e-5
    recons = REFERENCE.decode(found.values, index, w_dec, b_dec)
    assert distance(kernels.decode(found.values, index, w_dec, b_dec), recons) < 1e-5
    truth = REFERENCE.decode_grads(grad, found.values, index, groups, w_dec)
    mine = kernels.decode_grads(grad, found.values, index, groups, w_dec)
    assert distance(mine.acts, truth.acts) < 1e-4
    assert distance(mine.w_dec, truth.w_dec) < 1e-4
    truth = REFERENCE.encode_grad(found.values, index, groups, grad)
    assert distance(kernels.encode_grad(found.values, index, groups, grad), truth) < 1e-4


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("precision", "share"), [(Precision.bfloat16, 0.985), (Precision.bfloat16_rescored, 0.999)])
def test_bfloat16_selects_the_same_latents(name, precision, share):
    given_ = projection(512, 512, 8192)
    expected = REFERENCE.topk(given_, 32)
    kernels, lower = pick("cpu", name), given_._replace(precision=precision)
    found = kernels.topk(lower, 32)
    chosen = torch.zeros(512, 8192, dtype=torch.bool)
    chosen[expected.rows, expected.cols] = True
    assert chosen[found.rows, found.cols].float().mean() >= share
    bar = expected.values.min()
    above = kernels.above(lower, bar)
    truth = (REFERENCE.pre_acts(given_) > bar).sum()
    assert abs(len(above.values) - int(truth)) <= (1 - share) * int(truth)
    if precision is Precision.bfloat16_rescored:
        exact = REFERENCE.pre_acts(given_)[found.rows, found.cols]
        torch.testing.assert_close(found.values, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("precision", list(Precision))
def test_ties_give_exactly_k(name, precision):
    given_ = projection(3, 8, 200, precision=precision)
    given_ = given_._replace(centred=torch.zeros(3, 8), b_enc=torch.zeros(200))
    found = pick("cpu", name).topk(given_, 7)
    assert found.rows.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert all(len(set(found.cols[found.rows == row].tolist())) == 7 for row in range(3))


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_not_a_number_is_selected_and_so_seen(name, where, sign):
    given_ = projection(4, 8, 500)
    bad = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    if where == "weight":
        given_.w_enc[2, 321] = bad
    else:
        given_.b_enc[321] = bad
    found = pick("cpu", name).topk(given_, 5)
    assert found.values[found.cols == 321].isnan().sum() == 4
    for precision in Precision:
        above = pick("cpu", name).above(given_._replace(precision=precision), torch.tensor(1.0))
        assert above.values[above.cols == 321].isnan().sum() == 4


@pytest.mark.parametrize("name", FAST)
def test_gives_up_on_dense_matrices(name):
    given_ = projection(64, 8, 300)
    kernels = pick("cpu", name)
    zero = torch.tensor(0.0)
    assert kernels.above(given_, zero, 0.1) is None
    assert kernels.above(given_, zero, 0.9) is not None


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_sphere", [True, False])
def test_adam(name, kind, on_sphere):
    kernels = pick("cpu", name)
    generator = torch.Generator().manual_seed(0)
    mine = torch.nn.functional.normalize(torch.randn(17, 37, generator=generator), dim=1)
    truth = mine.clone()
    moments, true_moments = Moments.zeros(kind, mine), Moments.zeros(kind, truth)
    scale = torch.tensor(0.7)
    for count in range(1, 6):
        grad = torch.randn(17, 37, generator=generator) * torch.logspace(-6, 0, 37)
        grad[3] = 0
        step = AdamStep(0.01, 0.9, 0.999, 1e-8, count, seed=5)
        norms = kernels.row_norms(grad, mine if on_sphere else None)
        true_norms = REFERENCE.row_norms(grad, truth if on_sphere else None)
        torch.testing.assert_close(norms.square_sum, true_norms.square_sum, rtol=1e-4, atol=1e-10)
        kernels.adam(mine, grad.clone(), moments, step, scale, norms.along)
        REFERENCE.adam(truth, grad, true_moments, step, scale, true_norms.along)
        # One code apart where the last bit of the moment decided how it was rounded; the parameter follows.
        tolerance = {"float32": 1e-5, "bfloat16": 2e-3, "float8": 5e-3}[kind]
        torch.testing.assert_close(mine, truth, rtol=0, atol=tolerance)
    if kind == "float8":
        same = (moments.exp_avg_sq == true_moments.exp_avg_sq).float().mean()
        assert same > 0.98
        assert (moments.exp_avg[3] == 0).all()
    if on_sphere:
        torch.testing.assert_close(mine.norm(dim=1), torch.ones(17))


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_compressed_moments_follow_a_slow_average(kind):
    """Rounded to nearest, a bf16 average with beta 0.999 stands still long before it arrives; at random it does not."""
    target = torch.logspace(-3, 0, 64).repeat(200, 1)
    moments = Moments.zeros(kind, target)
    for step in range(4000):
        _, second = moments.read()
        moments.write(torch.zeros_like(target), second.lerp(target, 0.001), seed=step * 2)
    error = (moments.read()[1] / target / (1 - 0.999**4000) - 1).mean(0)
    assert error.abs().max() < 0.05
    if kind == "bfloat16":
        stuck = torch.zeros(64, dtype=torch.bfloat16)
        for _ in range(4000):
            stuck = stuck.float().lerp(target[0], 0.001).bfloat16()
        assert (stuck.float() / target[0] < 0.8).all()


def test_rounding_keeps_the_mean():
    values = torch.randn(64, 100) * torch.logspace(-4, 0, 100)
    scale = values.abs().amax(1)
    sums = torch.zeros(3, 64, 100)
    n = 400
    for seed in range(n):
        noise = random_bits(values, seed)
        sums[0] += round_bfloat16(values, noise).float()
        sums[1] += decode8(encode8(values, scale, 4, noise, signed=True), scale, 4, signed=True)
        squares = encode8(values.square(), scale.square(), 5, noise, signed=False)
        sums[2] += decode8(squares, scale.square(), 5, signed=False)
    steps = (2**-8, 2**-3, 2**-3)
    smallest = (0.0, 2.0**-15, 2.0**-31)
    for total, truth, step, floor, top in zip(
        sums, (values, values, values.square()), steps, smallest, (scale, scale, scale.square()), strict=True
    ):
        tolerance = 6 * (step * truth.abs() + floor * top[:, None]) / n**0.5
        assert ((total / n - truth).abs() <= tolerance).float().mean() > 0.999


def test_hash_is_uniform_and_differs_by_seed():
    bits = random_bits(torch.empty(1000, 100), 3)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    counts = torch.bincount(bits.flatten() >> 24, minlength=256).float()
    expected = 100_000 / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 340  # chi-square, 255 degrees of freedom, p = 2e-4
    other = random_bits(torch.empty(1000, 100), 4)
    assert (bits == other).float().mean() < 1e-3


@pytest.mark.skipif("cpp" not in FAST, reason="no C++ compiler on this machine")
def test_threads_do_not_change_a_bit():
    given_ = projection(100, 64, 1000, precision=Precision.bfloat16)
    kernels, before = pick("cpu", "cpp"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = kernels.topk(given_, 10)
            index = Index(found.rows, found.cols, 100, 1000)
            groups = kernels.by_latent(index)
            grads = kernels.decode_grads(given_.centred, found.values, index, groups, given_.w_enc.t().contiguous())
            norms = kernels.row_norms(grads.w_dec, given_.w_enc.t().contiguous())
            results.append([*found, *grads, *norms])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_cannot_run_is_refused():
    with pytest.raises(UserError, match="did you mean"):
        pick("cpu", "tritom")
    with pytest.raises(UserError, match="CUDA"):
        pick("cpu", "triton")
    with pytest.raises(UserError, match="bfloat16_rescored"):
        pick_precision("cpu", "int8")
    assert pick_precision("cpu", "float32") is Precision.float32
