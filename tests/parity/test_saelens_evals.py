"""SAELens agrees on an SAE in a language model: reconstruction, and what splicing it in costs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peers import ask_peer
from safetensors.torch import save_file
from tiny_lms import save_checkpoint

from sae.autoencoder.sae import SAE, SAEConfig
from sae.evals.reconstruction import ReconstructionMeter
from sae.evals.splice import splice
from sae.lm.load import load_lm
from sae.lm.tokens import Role, TokenBatch

HOOK, K, ROWS, LENGTH = "blocks.1.hook_resid_post", 6, 12, 24

WORKER = """
import json, sys, torch
from safetensors.torch import load_file
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.evals import get_downstream_reconstruction_metrics, get_recons_loss, get_sparsity_and_variance_metrics
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

folder, given, hook, k = sys.argv[1:]
given = load_file(given)
tokens = given.pop("tokens")
lm = TransformerBridge.boot_transformers(folder, device="cpu")
d_in, d_sae = given["W_enc"].shape
sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=int(k), metadata=SAEMetadata(hook_name=hook)))
sae.load_state_dict(given)


class Batches:
    def __init__(self, n_rows):
        self.parts = iter(tokens.split(n_rows))

    def get_batch_tokens(self, n):
        return next(self.parts)


scaler, n = ActivationScaler(), len(tokens) // 4
with torch.no_grad():
    found, _ = get_sparsity_and_variance_metrics(sae, lm, Batches(4), scaler, n, True, True, True, True, 4, {})
    found |= get_downstream_reconstruction_metrics(sae, lm, Batches(4), scaler, True, True, n, 4)
    # They average the bias, a ratio, over batches: theirs is one of all tokens only where there is one batch.
    whole, _ = get_sparsity_and_variance_metrics(sae, lm, Batches(99), scaler, 1, True, False, False, False, 4, {})
    found["relative_reconstruction_bias"] = whole["relative_reconstruction_bias"]
    each = get_recons_loss(sae, lm, scaler, tokens, True, True)
# They average KL over all tokens; the last of a row predicts nothing that is there.
for name in ("kl_div_with_sae", "kl_div_with_ablation"):
    found[name] = each[name][:, :-1].mean().item()
print(json.dumps(found))
"""
THEIRS = {
    "l0": "l0",
    "explained_variance": "fve",
    "mse": "mse",
    "cossim": "cosine",
    "relative_reconstruction_bias": "relative_bias",
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce_sae",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "ce_recovered",
    "kl_div_with_sae": "kl",
    "kl_div_with_ablation": "kl_zero",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our metrics and theirs, of one SAE on the same tokens; every token is replaced, BOS or not."""
    folder = tmp_path_factory.mktemp("saelens")
    lm = load_lm(str(save_checkpoint(folder / "lm", "llama")), device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 250, (ROWS, LENGTH), generator=generator)
    batch = TokenBatch(
        tokens, torch.ones_like(tokens, dtype=torch.bool), torch.full_like(tokens, int(Role.TEXT)).byte()
    )
    acts = lm.activations(batch, [HOOK])[HOOK].flatten(0, 1)
    sae = SAE(SAEConfig("topk", 32, 64, K, 0, HOOK, "toy"))
    with torch.no_grad():  # an encoder of its own, biases, and latents that reconstruct in part
        sae.W_enc.copy_(0.3 * (sae.W_enc + 0.05 * torch.randn(sae.W_enc.shape, generator=generator)))
        sae.b_dec.copy_(acts.mean(0))
        sae.b_enc.copy_(0.1 * torch.randn(64, generator=generator))
    state = {name: value.detach().contiguous() for name, value in sae.state_dict().items()}
    save_file({**state, "tokens": tokens}, folder / "given.safetensors")
    theirs = ask_peer(WORKER, folder, folder / "lm", folder / "given.safetensors", HOOK, K)
    meter = ReconstructionMeter(sae)
    meter.update(acts)
    spliced = splice(lm, sae, [batch], splice_mask=lambda given: given.mask)
    return meter.result()._asdict() | spliced._asdict(), theirs, sae, acts


def test_metrics_are_those_of_saelens(both):
    ours, theirs, _, _ = both
    for name, own in THEIRS.items():
        assert ours[own] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert 0.05 < ours["fve"] < 0.95
    assert ours["kl"] > 0.1


def test_what_they_call_legacy_is_another_number(both):
    """1 - mean over tokens of ||x - recons||^2 / ||x - mean||^2, batch by batch: easy tokens count as much as hard."""
    ours, theirs, sae, acts = both
    with torch.no_grad():
        errors = (acts - sae(acts).recons).square().sum(1)
    shares = [
        error / (part - part.mean(0)).square().sum(1)
        for part, error in zip(acts.split(4 * LENGTH), errors.split(4 * LENGTH), strict=True)
    ]
    legacy = 1 - float(torch.cat(shares).mean())
    assert theirs["explained_variance_legacy"] == pytest.approx(legacy, rel=1e-4)
    assert abs(legacy - ours["fve"]) > 0.005
