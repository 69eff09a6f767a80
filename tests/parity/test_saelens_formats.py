"""SAELens and we agree on what a folder computes: on those that it writes, and on those that we write for it."""

import dataclasses
import json

import pytest
import torch
from peers import ask_peer
from random_saes import assert_close, inputs, random_sae
from safetensors.torch import load_file, save_file

import sae
from sae.formats.saelens_write import write

D_IN, D_SAE, D_OUT, HEADS = 16, 48, 12, 4
HOOK_Z = "blocks.1.attn.hook_z"

WORKER = """
import copy, json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

warnings.simplefilter("ignore")
root = Path(sys.argv[1])
cases = json.loads((root / "cases.json").read_text())
x = load_file(root / "x.safetensors")["x"]


def outputs(sae):
    given = x.view(len(x), 4, -1) if sae.cfg.reshape_activations == "hook_z" else x
    with torch.no_grad():
        found = {"latents": sae.encode(given), "recons": sae(given).reshape(len(x), -1)}
        if sae.cfg.normalize_activations == "none" and given is x:
            found["decoded"] = sae.decode(found["latents"])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def randomise(sae, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like: torch.randn(like.shape, generator=generator)
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name == "W_dec":
                tensor.copy_(draw(tensor) / tensor.shape[1] ** 0.5)
                if getattr(sae.cfg, "residual_threshold", 0) > 0.1:  # a residual falls to it where rows have norm 1
                    tensor.div_(tensor.norm(dim=1, keepdim=True))
                else:
                    tensor.mul_(0.3 + 2 * torch.rand(len(tensor), 1, generator=generator))
            elif name == "threshold":
                tensor.copy_(1.5 * torch.rand(tensor.shape, generator=generator) - 0.3)
            elif name == "W_enc":
                tensor.copy_(draw(tensor) / tensor.shape[0] ** 0.5)
            else:
                tensor.copy_(0.5 * draw(tensor))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7123456789)
    return sae


def build(case, find):
    cls, cfg_class = find(case["architecture"])
    metadata = SAEMetadata(model_name="toy", hook_name=case.get("hook_name", "blocks.1.hook_resid_post"))
    if "d_out" in case["cfg"]:
        metadata.hook_name_out = "blocks.1.hook_mlp_out"
    return cls(cfg_class(d_in=x.shape[1], d_sae=48, metadata=metadata, **case["cfg"]))


for number, (name, case) in enumerate(cases["theirs"].items()):
    folder = root / "theirs" / name
    if case["kind"] == "checkpoint":
        sae = randomise(build(case, get_sae_training_class), number)
        scaler = ActivationScaler(scaling_factor=case.get("scale"))
        if case.get("whiten"):
            scaler.estimate_whitening(x.shape[1], iter([x, x]), n_batches_for_norm_estimate=2)
        sae.save_model(folder)
        scaler.save(str(folder / "activation_scaler.json"))
        torch.manual_seed(0)
        with torch.no_grad():  # as it is trained: scale, reconstruct, scale back
            trained = scaler.unscale(sae.decode(sae.encode(scaler.scale(x))))
        naive = outputs(SAE.load_from_disk(folder))["recons"] if case.get("loads", True) else trained
        final = copy.deepcopy(sae)
        if scaler.scaling_factor is not None:
            final.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            w = scaler.whitening
            final.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
        final.save_inference_model(root / "final" / name)
        found = outputs(SAE.load_from_disk(root / "final" / name)) | {"trained": trained, "naive": naive}
    else:
        sae = randomise(build(case, get_sae_class), number)
        sae.save_model(folder)
        if case["kind"] == "flat":
            cfg = {"d_in": x.shape[1], "d_sae": 48, "dtype": "torch.float32", "device": "cpu", "model_name": "toy"}
            (folder / "cfg.json").write_text(json.dumps(cfg | case["flat"]))
        found = outputs(SAE.load_from_disk(folder))
    save_file({key: tensor.clone().contiguous() for key, tensor in found.items()}, root / f"theirs-{name}.safetensors")
for folder in (root / "ours").iterdir():
    loaded = SAE.load_from_disk(folder)
    assert loaded.cfg.metadata.model_name == "toy"
    save_file(outputs(loaded), root / f"ours-{folder.name}.safetensors")
print(json.dumps(len(cases["theirs"])))
"""


def trained(architecture, hook_name="blocks.1.hook_resid_post", **cfg):
    return {"kind": "inference", "architecture": architecture, "hook_name": hook_name, "cfg": cfg}


def transcoder(architecture):
    return trained(architecture, "blocks.1.ln2.hook_normalized", d_out=D_OUT, apply_b_dec_to_input=False)


def checkpoint(architecture, scale=None, whiten=False, loads=True, **cfg):
    kind = "covariance_whitening" if whiten else "expected_average_only_in" if scale else "none"
    cfg |= {"normalize_activations": kind}
    return {"kind": "checkpoint", "architecture": architecture, "scale": scale, "whiten": whiten, "cfg": cfg} | {
        "loads": loads
    }


def flat(architecture, said, **cfg):
    """Weights as today's class makes them, under a `cfg.json` as versions before 6.0 wrote it."""
    return {"kind": "flat", "architecture": architecture, "cfg": cfg, "flat": said}


WIDTHS = [7, 20, 48]
AS_TRAINED = ("standard", "gated", "topk", "abstopk", "matching_pursuit")
BATCH = {"k": 4.5, "loads": False}  # SAE.load_from_disk knows no class for them
OLD = {"hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "l1_coefficient": 8e-5, "lr": 4e-4}
THEIRS = {
    "standard": trained("standard"),
    "standard-uncentred": trained("standard", apply_b_dec_to_input=False),
    "standard-layer-norm": trained("standard", normalize_activations="layer_norm"),
    "standard-hook-z": trained("standard", HOOK_Z, reshape_activations="hook_z"),
    "topk": trained("topk", k=5),
    "topk-rescaled": trained("topk", k=5, rescale_acts_by_decoder_norm=True),
    "topk-layer-norm": trained("topk", k=5, normalize_activations="layer_norm", apply_b_dec_to_input=False),
    "topk-rms": trained("topk", k=5, normalize_activations="constant_norm_rescale", rescale_acts_by_decoder_norm=True),
    "abstopk": trained("abstopk", k=5, rescale_acts_by_decoder_norm=True),
    "jumprelu": trained("jumprelu"),
    "jumprelu-uncentred": trained("jumprelu", apply_b_dec_to_input=False),
    "gated": trained("gated"),
    "gated-uncentred": trained("gated", apply_b_dec_to_input=False),
    "pursuit": trained("matching_pursuit", residual_threshold=0.5),
    "pursuit-uncentred": trained("matching_pursuit", apply_b_dec_to_input=False, residual_threshold=0.0),
    "pursuit-repeating": trained("matching_pursuit", max_iterations=7, stop_on_duplicate_support=False),
    "transcoder": transcoder("transcoder"),
    "skip_transcoder": transcoder("skip_transcoder"),
    "jumprelu_transcoder": transcoder("jumprelu_transcoder"),
    "jumprelu_skip_transcoder": transcoder("jumprelu_skip_transcoder"),
    "checkpoint-standard": checkpoint("standard", 0.37),
    "checkpoint-standard-plain": checkpoint("standard"),
    "checkpoint-standard-whitened": checkpoint("standard", whiten=True),
    "checkpoint-uncentred-whitened": checkpoint("standard", whiten=True, apply_b_dec_to_input=False),
    "checkpoint-gated": checkpoint("gated", 0.37),
    "checkpoint-gated-whitened": checkpoint("gated", whiten=True, apply_b_dec_to_input=False),
    "checkpoint-jumprelu": checkpoint("jumprelu", 0.37, jumprelu_sparsity_loss_mode="quadratic", target_l0=6.0),
    "checkpoint-topk": checkpoint("topk", 0.37, k=5),
    "checkpoint-topk-whitened": checkpoint("topk", whiten=True, k=5),
    "checkpoint-topk-bare": checkpoint("topk", 0.37, k=5, rescale_acts_by_decoder_norm=False),
    "checkpoint-abstopk": checkpoint("abstopk", 0.37, k=5),
    "checkpoint-batchtopk": checkpoint("batchtopk", 0.37, **BATCH),
    "checkpoint-batchtopk-bare": checkpoint("batchtopk", 0.37, rescale_acts_by_decoder_norm=False, **BATCH),
    "checkpoint-batchtopk-whitened": checkpoint("batchtopk", whiten=True, **BATCH),
    "checkpoint-pursuit": checkpoint("matching_pursuit", 0.37, residual_threshold=2.0),
    "checkpoint-matryoshka": checkpoint("matryoshka_batchtopk", 0.37, matryoshka_widths=WIDTHS, **BATCH),
    "flat-standard": flat("standard", OLD),
    "flat-uncentred": flat("standard", OLD | {"apply_b_dec_to_input": False, "normalize_activations": False}),
    "flat-hook-z": flat("standard", OLD | {"hook_point": HOOK_Z}),
    "flat-topk": flat(
        "topk",
        OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "normalize_activations": "layer_norm"},
        k=5,
    ),
    "flat-gated": flat("gated", OLD | {"architecture": "gated", "activation_fn_str": "relu"}),
    "flat-jumprelu": flat("jumprelu", OLD | {"architecture": "jumprelu", "normalize_activations": "none"}),
}
TO_MLP = "blocks.1.ln2.hook_normalized->blocks.1.hook_mlp_out"
OURS = {
    "relu": {},
    "relu-layer-norm": {"architecture": "relu", "normalize": "layer_norm"},
    "relu-hook-z": {"architecture": "relu", "hook_name": HOOK_Z},
    "topk": {},
    "topk-rms": {"architecture": "topk", "normalize": "rms"},
    "hierarchical_topk": {},
    "abs_topk": {},
    "batch_topk": {"l0": 4.5},
    "matryoshka_batch_topk": {},
    "jumprelu": {},
    "matryoshka_jumprelu": {},
    "gated": {},
    "matching_pursuit": {},
    "matching_pursuit-repeating": {
        "architecture": "matching_pursuit",
        "options": {"max_steps": 7, "stop_on_repeat": False},
    },
    "transcoder": {"architecture": "relu", "hook_name": TO_MLP, "d_out": D_OUT},
    "skip-transcoder": {"architecture": "relu", "hook_name": TO_MLP, "d_out": D_OUT, "skip": True},
    "jumprelu-transcoder": {"architecture": "jumprelu", "hook_name": TO_MLP},
    "batch-topk-skip-transcoder": {"architecture": "batch_topk", "hook_name": TO_MLP, "d_out": D_OUT, "skip": True},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Their folders and outputs, our folders and their outputs of them, on the same inputs."""
    root = tmp_path_factory.mktemp("saelens")
    x, saes = inputs(), {}
    for number, (name, case) in enumerate(OURS.items()):
        saes[name] = random_sae(**({"architecture": name, "seed": number} | case))
        write(saes[name], root / "ours" / name)
    save_file({"x": x}, root / "x.safetensors")
    (root / "cases.json").write_text(json.dumps({"theirs": THEIRS}))
    ask_peer(WORKER, root, root)
    return root, x, saes


def check(ours, x, expected):
    with torch.no_grad():
        found = ours(x)
        assert_close(found.latent_acts, expected["latents"])
        assert_close(found.recons, expected["recons"])
        if "decoded" in expected:
            assert_close(ours.decode(expected["latents"]), expected["decoded"])
    n_active = (expected["latents"] != 0).sum(1)
    assert 0 < n_active.float().mean() < D_SAE  # not all off, nor all on


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_they_do_with_their_folders(both, name):
    root, x, _ = both
    expected = load_file(root / f"theirs-{name}.safetensors")
    read = sae.load(root / "theirs" / name)
    check(read, x, expected)
    case = THEIRS[name]
    # As in training, too, where that does not depend on the rest of the batch or on a threshold below 0.
    if case["kind"] == "checkpoint" and case["architecture"] in AS_TRAINED:
        with torch.no_grad():
            assert_close(read(x).recons, expected["trained"], 1e-4 if case["whiten"] else 1e-5)
    said = json.loads((root / "theirs" / name / "cfg.json").read_text())
    assert read.config.metadata["source"]["said"] == said
    assert read.config.lm_name == "toy"


@pytest.mark.parametrize("name", ["checkpoint-standard", "checkpoint-topk", "checkpoint-gated-whitened"])
def test_they_open_checkpoints_without_the_scaling_and_we_do_not(both, name):
    root, x, _ = both
    expected = load_file(root / f"theirs-{name}.safetensors")
    assert (expected["naive"] - expected["trained"]).norm() > 0.1 * expected["trained"].norm()
    with torch.no_grad():
        assert_close(sae.load(root / "theirs" / name)(x).recons, expected["trained"], 1e-4)


@pytest.mark.parametrize("name", OURS)
def test_they_compute_what_we_do_with_our_folders(both, name):
    root, x, saes = both
    expected = load_file(root / f"ours-{name}.safetensors")
    check(saes[name], x, expected)
    again = sae.load(root / "ours" / name)
    check(again, x, expected)
    # And what comes back through their format is for the same place.
    for key in ("d_in", "d_sae", "hook_name", "lm_name", "width_out", "skip", "normalize"):
        assert getattr(again.config, key) == getattr(saes[name].config, key)


def test_matryoshka_prefixes_are_theirs(both):
    root, _, _ = both
    found = sae.load(root / "theirs" / "checkpoint-matryoshka")
    assert found.sparsity.prefix_sizes(0) == WIDTHS
    assert (found.config.l0, found.config.architecture) == (4.5, "matryoshka_batch_topk")


def test_a_checkpoint_goes_through_our_own_format(both, tmp_path):
    root, x, _ = both
    found = sae.load(root / "theirs" / "checkpoint-batchtopk")
    found.save(tmp_path / "own")
    again = sae.load(tmp_path / "own")
    assert dataclasses.asdict(again.config) == dataclasses.asdict(found.config)
    with torch.no_grad():
        assert torch.equal(again(x).recons, found(x).recons)
