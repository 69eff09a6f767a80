"""SAEs with nothing at rest: biases, thresholds, gains, decoder norms and skips are all drawn at random."""

import torch

from sae.autoencoder.sae import SAEConfig, make


def random_sae(architecture, hook_name="blocks.1.hook_resid_post", d_in=16, d_sae=48, l0=5, seed=0, **more):
    sae = make(SAEConfig(architecture, d_in, d_sae, l0, seed, hook_name, "toy", **more))
    generator = torch.Generator().manual_seed(seed)

    def draw(like, size=1.0):
        return size * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        sae.W_enc += draw(sae.W_enc, 0.2)
        if architecture != "matching_pursuit":  # whose residual grows where rows are long
            sae.W_dec *= 0.3 + 2 * torch.rand(d_sae, 1, generator=generator)
        sae.b_enc += draw(sae.b_enc, 0.5)
        sae.b_dec += draw(sae.b_dec)
        if sae.W_skip is not None:
            sae.W_skip += draw(sae.W_skip, 0.5)
        for name in ("threshold", "residual_threshold"):
            threshold = getattr(sae.sparsity, name, None)
            if threshold is not None:
                threshold += (3 if name == "residual_threshold" else 0.5) + torch.rand(
                    threshold.shape, generator=generator
                )
        if architecture == "gated":
            sae.sparsity.log_gain += draw(sae.sparsity.log_gain, 0.5)
            sae.sparsity.shift += draw(sae.sparsity.shift, 0.5)
    return sae.eval()


def inputs(n=64, d_in=16, seed=1):
    """Off-centre and of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 3 * torch.rand(n, 1, generator=generator)) * torch.randn(n, d_in, generator=generator) + 1


def assert_close(found, expected, tolerance=1e-5):
    """Relative to the largest value, which must not be 0."""
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    assert largest > 0
    assert float((found - expected).abs().max()) <= tolerance * largest
