"""Hook points that published releases name by Hugging Face modules, on a tiny Gemma 3: the same activations."""

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_lms import save_checkpoint

from sae.formats.gemma_scope import EMBEDDING, SITES
from sae.formats.gemma_scope_2 import HOOKS
from sae.lm.load import load_lm

LAYER = 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = save_checkpoint(tmp_path_factory.mktemp("gemma3"), "gemma3")
    return load_lm(str(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_gemma_scope_2_hooks_are_these_modules(models):
    lm, plain = models
    batch, seen = lm.tokenize(["a few words"]), {}
    for where in HOOKS:
        name, side = where.rpartition(".")[::2]
        module = plain.model.layers[LAYER].get_submodule(name)

        def watch(_, given, out, where=where, side=side):
            value = given[0] if side == "input" else out
            seen[where] = value[0] if isinstance(value, tuple) else value

        module.register_forward_hook(watch)
    plain(batch.tokens)
    names = {where: name.format(layer=LAYER) for where, name in HOOKS.items()}
    found = lm.activations(batch, list(names.values()))
    for where, name in names.items():
        torch.testing.assert_close(found[name].reshape(seen[where].shape), seen[where], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gemma_scope_reads_the_norm_before_its_gain_and_scaled_embeddings(models):
    lm, plain = models
    batch = lm.tokenize(["a few words"])
    reads = SITES["transcoders"].format(layer=LAYER).split("->")[0]
    mid = f"blocks.{LAYER}.hook_resid_mid"
    found = lm.activations(batch, [reads, mid, EMBEDDING])
    scale = found[mid].square().mean(-1, keepdim=True).add(plain.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(found[reads], found[mid] / scale, rtol=1e-4, atol=1e-4)
    rows = plain.model.embed_tokens.weight[batch.tokens]
    torch.testing.assert_close(found[EMBEDDING], rows * math.sqrt(rows.shape[-1]), rtol=1e-4, atol=1e-4)
