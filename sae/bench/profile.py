"""Suite `profile`: where the time of one TopK step goes, by dense autograd's operations and by the kernels'.

"before" times, one by one, the operations that a dense implementation differentiated by autograd carries out (six
[batch d_in d_sae] matmuls among them); "after" those of `sae.autoencoder.gradients` with each set of kernels. The
last line of each is the whole step, measured as such; what the parts do not add up to is the small change between.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sae.bench.options import BenchOptions
from sae.kernels import pick, pick_precision
from sae.kernels.build import library
from sae.kernels.moments import Moments
from sae.kernels.operands import Index, Projection
from sae.kernels.reference import AdamStep, Kernels
from sae.train.grid import SAESpec
from sae.train.initialise import input_stats
from sae.train.run import SAERun
from sae.train.settings import TrainSettings

COLUMNS = ["kernels", "part", "ms", "share"]
D_IN, D_SAE, K, BATCH = 512, 8192, 32, 2048
QUICK = 16


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Time the parts of a step, and the step."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        sizes = (D_IN, D_SAE, K, BATCH) if not options.quick else (D_IN // QUICK, D_SAE // QUICK, 8, BATCH // QUICK)
        repeats = 2 if options.quick else options.repeats
        x = torch.randn(sizes[3], sizes[0], generator=torch.Generator().manual_seed(0))
        rows = _rows("reference", _dense_parts(x, *sizes[1:3]), _step(x, "reference", *sizes[1:3]), repeats)
        for name in ("torch", *(["cpp"] if library().handle is not None else [])):
            kernels = pick("cpu", name)
            rows += _rows(name, _sparse_parts(kernels, x, *sizes[1:3]), _step(x, name, *sizes[1:3]), repeats)
        return [{**row, "d_in": sizes[0], "d_sae": sizes[1], "k": sizes[2], "batch_tokens": sizes[3]} for row in rows]
    finally:
        torch.set_num_threads(before)


def _rows(
    kernels: str, parts: dict[str, Callable[[], object]], step: Callable[[], object], repeats: int
) -> list[dict[str, Any]]:
    times = {name: _median_ms(action, repeats) for name, action in {**parts, "whole step": step}.items()}
    whole = times["whole step"]
    return [{"kernels": kernels, "part": name, "ms": ms, "share": ms / whole} for name, ms in times.items()]


def _median_ms(action: Callable[[], object], repeats: int) -> float:
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _step(x: Tensor, kernels: str, d_sae: int, k: int) -> Callable[[], object]:
    settings = TrainSettings(total_tokens=10_000 * len(x), batch_tokens=len(x), kernels=kernels)
    precision = pick_precision("cpu", "float32" if kernels == "reference" else "auto")
    spec = SAESpec("bench", "topk", d_sae, k, 0)
    sae = SAERun(spec, {"bench": x.shape[1]}, settings, "", "", torch.device("cpu"), pick("cpu", kernels), precision)
    sae.initialise({"bench": input_stats(x, "bench")})
    return lambda: sae.train_step(sae.inputs({"bench": x}), 0)


def _dense_parts(x: Tensor, d_sae: int, k: int) -> dict[str, Callable[[], object]]:
    d_in = x.shape[1]
    w_enc = F.normalize(torch.randn(d_sae, d_in), dim=1).t()
    w_dec = w_enc.t().contiguous()
    pre_acts = x @ w_enc
    best = pre_acts.topk(k, dim=1, sorted=False)
    acts = torch.zeros_like(pre_acts).scatter(1, best.indices, best.values)
    parameters = [torch.nn.Parameter(w_enc.t().contiguous()), torch.nn.Parameter(w_dec.clone())]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam(parameters)
    return {
        "encoder product": lambda: x @ w_enc,
        "select": lambda: pre_acts.topk(k, dim=1, sorted=False),
        "scatter": lambda: torch.zeros_like(pre_acts).scatter(1, best.indices, best.values),
        "decoder product": lambda: acts @ w_dec,
        "error and loss": lambda: ((x - x).square().sum(), x * 2),
        "gradient of W_dec": lambda: acts.t() @ x,
        "gradient of the latents": lambda: x @ w_dec.t(),
        "through the selection": lambda: torch.zeros_like(pre_acts).scatter(
            1, best.indices, acts.gather(1, best.indices)
        ),
        "gradient of W_enc": lambda: x.t() @ acts,
        "gradient of b_dec, as that of x": lambda: acts @ w_enc.t(),
        "firing statistics": lambda: acts.bool().float().sum(0),
        "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "Adam": adam.step,
    }


def _sparse_parts(kernels: Kernels, x: Tensor, d_sae: int, k: int) -> dict[str, Callable[[], object]]:
    batch, d_in = x.shape
    precision = pick_precision("cpu")
    w_dec = F.normalize(torch.randn(d_sae, d_in), dim=1)
    w_enc, b_dec = w_dec.clone().t(), torch.zeros(d_in)
    projection = Projection(x, w_enc, torch.zeros(d_sae), precision)
    low_x, low_w = x.to(precision.dtype), w_enc.to(precision.dtype)
    buffer = torch.empty(min(batch, 256), d_sae, dtype=precision.dtype)

    def product() -> None:
        for part in low_x.split(len(buffer)):
            torch.mm(part, low_w, out=buffer[: len(part)])

    found = kernels.topk(projection, k)
    index = Index(found.rows, found.cols, batch, d_sae)
    groups = kernels.by_latent(index)
    grad, values = torch.randn_like(x), found.values
    gradient, moments = torch.randn(d_sae, d_in), Moments.zeros("float32", w_dec)
    norms, adam, one = kernels.row_norms(gradient, w_dec), AdamStep(1e-4, 0.9, 0.999, 1e-8, 1, 0), torch.tensor(1.0)

    def both_norms() -> None:
        kernels.row_norms(gradient, w_dec)
        kernels.row_norms(gradient)

    def both_steps() -> None:
        kernels.adam(w_dec, gradient, moments, adam, one, norms.along)
        kernels.adam(w_dec, gradient, moments, adam, one)

    return {
        "centre and cast": lambda: ((x - b_dec).to(precision.dtype), w_enc.to(precision.dtype)),
        f"encoder product ({precision.value}), in chunks": product,
        "encoder product and selection": lambda: kernels.topk(projection, k),
        "regroup by latent": lambda: kernels.by_latent(Index(found.rows, found.cols, batch, d_sae)),
        "decode": lambda: kernels.decode(values, index, w_dec, b_dec),
        "error and loss": lambda: ((x - x).square().sum(), x * 2),
        "gradients of W_dec and the latents": lambda: kernels.decode_grads(grad, values, index, groups, w_dec),
        "gradient of W_enc": lambda: kernels.encode_grad(values, index, groups, x),
        "gradients of the biases": lambda: grad.sum(0).addmv_(
            w_enc, torch.zeros(d_sae).index_add_(0, found.cols, values), alpha=-1
        ),
        "norms and projection": both_norms,
        "Adam, clip, unit rows": both_steps,
    }
