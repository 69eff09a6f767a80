"""Files in the layouts of published releases, from known tensors; small ones, in folders named as the real ones are."""

import json
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, D_SAE = 16, 48


class Weights(NamedTuple):
    """In the layout x @ W_enc, acts @ W_dec; decoder rows of all lengths, biases and thresholds that matter."""

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor
    W_skip: torch.Tensor

    def rounded(self):
        """As bf16 stores them."""
        return Weights(*(tensor.bfloat16().float() for tensor in self))


def weights(seed=0, d_in=D_IN, d_sae=D_SAE):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    W_dec = normal(d_sae, d_in) * (0.2 + torch.rand(d_sae, 1, generator=generator))
    threshold = 0.05 + torch.rand(d_sae, generator=generator)
    return Weights(
        0.5 * normal(d_in, d_sae), W_dec, 0.3 * normal(d_sae), normal(d_in), threshold, 0.3 * normal(d_in, d_in)
    )


def layers_of(n, causal=False):
    """Weights of n layers, and decoders from each to each; from each to itself and later ones where `causal`."""
    layers = [weights(seed) for seed in range(n)]
    W_dec = torch.stack([torch.stack([weights(10 * i + j + 50).W_dec for j in range(n)], dim=1) for i in range(n)])
    return layers, [W_dec[i][:, i:] for i in range(n)] if causal else W_dec


def _safetensors(path, dtype=torch.float32, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def gemma_scope(root, w, names="gemma-scope-2b-pt-res/layer_12/width_1k/average_l0_82", **more):
    folder = root / names
    folder.mkdir(parents=True)
    tensors = {name: getattr(w, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")} | more
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return folder


def gemma_scope_2(
    root,
    w,
    names="gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big",
    hook_in="model.layers.17.output",
    hook_out="model.layers.17.output",
    type="sae",
    skip=False,
    config=True,
    **more,
):
    folder = root / names
    extra = {"affine_skip_connection": w.W_skip} if skip else {}
    _safetensors(
        folder / "params.safetensors",
        w_enc=w.W_enc, w_dec=w.W_dec, b_enc=w.b_enc, b_dec=w.b_dec, threshold=w.threshold, **extra,
    )  # fmt: skip
    if config:
        write_json(folder / "config.json", gemma_scope_2_config(hook_in, hook_out, type, skip, D_SAE) | more)
    return folder


def gemma_scope_2_config(hook_in, hook_out, type, skip, width):
    return {
        "hf_hook_point_in": hook_in, "hf_hook_point_out": hook_out, "width": width, "l0": 15, "type": type,
        "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "affine_connection": skip,
    }  # fmt: skip


def gemma_scope_2_layers(root, layers, names, W_dec, config):
    """A crosscoder or cross-layer transcoder: weights of each layer, and W_dec [layer d_sae layer d_in]."""
    folder = root / names
    for i, w in enumerate(layers):
        skip = {"affine_skip_connection": w.W_skip} if config["affine_connection"] else {}
        _safetensors(
            folder / f"params_layer_{i}.safetensors",
            w_enc=w.W_enc, w_dec=W_dec[i], b_enc=w.b_enc, b_dec=w.b_dec, threshold=w.threshold, **skip,
        )  # fmt: skip
    write_json(folder / "config.json", config)
    return folder


def llama_scope(root, w, names="Llama3_1-8B-Base-L15R-8x", norms=(17.125, 17.125), **more):
    folder = root / names
    _safetensors(
        folder / "checkpoints" / "final.safetensors",
        torch.bfloat16,
        **{"encoder.weight": w.W_enc.T, "decoder.weight": w.W_dec.T, "encoder.bias": w.b_enc, "decoder.bias": w.b_dec},
    )
    hook = "blocks.15.hook_resid_post"
    config = {
        "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "hook_point_in": hook, "hook_point_out": hook,
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 3, "d_model": D_IN,
        "d_sae": D_SAE, "bias_init_method": "all_zero", "act_fn": "jumprelu", "jump_relu_threshold": 0.52734375,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": norms[0], "out": norms[1]},
        "decoder_exactly_fixed_norm": False, "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
        "init_decoder_norm": 0.5, "init_encoder_norm": None, "init_encoder_with_decoder_transpose": True, "lp": 1,
        "l1_coefficient": 8e-05, "l1_coefficient_warmup_steps": 78125, "top_k": 20, "k_warmup_steps": 78125,
        "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
    }  # fmt: skip
    write_json(folder / "hyperparams.json", config | more)
    return folder


def llama_scope_r1(root, w, names="Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L15R", norm=8.0, **more):
    folder, hook = root / names, "blocks.15.hook_resid_post"
    norms = {} if norm is None else {f"dataset_average_activation_norm.{hook}": torch.tensor(norm)}
    _safetensors(
        folder / "sae_weights.safetensors",
        **{"encoder.weight": w.W_enc.T, "decoder.weight": w.W_dec.T, "encoder.bias": w.b_enc, "decoder.bias": w.b_dec},
        log_jumprelu_threshold=w.threshold.log(),
        **norms,
    )
    config = {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "expansion_factor": 3,
        "use_decoder_bias": True, "use_glu_encoder": False, "act_fn": "jumprelu", "jump_relu_threshold": 0.0,
        "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True, "top_k": 20, "jumprelu_threshold_window": 2.0,
    }  # fmt: skip
    write_json(folder / "config.json", config | more)
    return folder


def qwen_scope(root, w, names="SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", config=True, **more):
    folder = root / names
    folder.mkdir(parents=True)
    tensors = {"W_enc": w.W_enc.T, "W_dec": w.W_dec.T, "b_enc": w.b_enc, "b_dec": w.b_dec}
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "layer5.sae.pt")
    if config:
        said = {
            "model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D_IN, "d_sae": len(w.b_enc),
            "k": 5, "num_layers": 28, "hook_point": "resid_post", "dtype": "float32",
        }  # fmt: skip
        write_json(folder / "config.json", said | more)
    return folder / "layer5.sae.pt"


def openai(root, w, names="resid_post_mlp_v5_32k/autoencoders/6.pt", activation="TopK", k=5, after="ReLU"):
    path = root / names
    path.parent.mkdir(parents=True)
    n = len(w.b_enc)
    state = {
        "pre_bias": w.b_dec, "encoder.weight": w.W_enc.T.contiguous(), "latent_bias": w.b_enc,
        "decoder.weight": w.W_dec.T.contiguous(), "stats_last_nonzero": torch.zeros(n, dtype=torch.long),
        "latents_activation_frequency": torch.ones(n), "latents_mean_square": torch.zeros(n), "activation": activation,
        "activation_state_dict": {"k": k, "postact_fn": after} if activation == "TopK" else {},
    }  # fmt: skip
    torch.save(state, path)
    return path


def linear_relu(root, w, name="Llama-3.1-8B-Instruct-SAE-l19.pth", layers=("encoder_linear", "decoder_linear")):
    encoder, decoder = layers
    tensors = {
        f"{encoder}.weight": w.W_enc.T, f"{encoder}.bias": w.b_enc,
        f"{decoder}.weight": w.W_dec.T, f"{decoder}.bias": w.b_dec,
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    torch.save({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, root / name)
    return root / name


def mwhanna(root, w, names="qwen3-4b-transcoders", skip=False, threshold=False, config=True, act_fn="relu", **more):
    folder = root / names
    extra = {"W_skip": w.W_skip.T} if skip else {}
    extra |= {"activation_function.threshold": w.threshold} if threshold else {}
    _safetensors(
        folder / "layer_18.safetensors",
        torch.bfloat16,
        W_enc=w.W_enc.T, W_dec=w.W_dec, b_enc=w.b_enc, b_dec=w.b_dec, **extra,
    )  # fmt: skip
    if config:
        said = {
            "model_name": "Qwen/Qwen3-4B", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
            "feature_output_hook": "mlp.hook_out", "scan": "qwen3-4b",
        }  # fmt: skip
        write_yaml(folder / "config.yaml", said | more)
        trained = {"d_model": D_IN, "d_feature": D_SAE, "act_fn": act_fn, "batch_size": 8192}
        (folder / "wandb-config.yaml").write_text("".join(f"{n}:\n    value: {v}\n" for n, v in trained.items()))
    return folder / "layer_18.safetensors"


def clt(root, layers, W_dec, names="clt-gemma-2-2b-2.5M", threshold=True, config=True, **more):
    """Weights of each layer, and W_dec: of layer l [d_sae n_layers-l d_in]."""
    folder = root / names
    for i, w in enumerate(layers):
        jump = {f"threshold_{i}": w.threshold} if threshold else {}
        _safetensors(
            folder / f"W_enc_{i}.safetensors",
            torch.bfloat16,
            **{f"W_enc_{i}": w.W_enc.T, f"b_enc_{i}": w.b_enc, f"b_dec_{i}": w.b_dec},
            **jump,
        )
        _safetensors(folder / f"W_dec_{i}.safetensors", torch.bfloat16, **{f"W_dec_{i}": W_dec[i]})
    if config:
        said = {
            "model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder",
            "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out",
        }  # fmt: skip
        write_yaml(folder / "config.yaml", said | more)
    return folder


def write_yaml(path, values):
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
