"""Memory and time of attribution on a language model with random weights, as docs/weights.md gives them.

    python scripts/weights_memory.py                                   # 100M parameters
    python scripts/weights_memory.py --layers 2 --d-model 128          # to try it

A Llama is made, with a tokenizer of bytes, and each method is run in a process of its own on 16 prompts a side. What is
printed is the peak of the process's resident memory, the model included and what the process had before it was loaded
left out, in units of the model's float32 size: while the behaviour and then the utility are scored, and while the two
differences of single weights are made of that. Seconds are of both.
"""

import argparse
import gc
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.behavior.contrast import load_contrast
from sae.behavior.cost import own_replies
from sae.behavior.measure import prepare, prepare_margins
from sae.lm.load import load_lm
from sae.lm.matrices import block_matrices
from sae.stages.localize import open_reference
from sae.weights.methods import EXPENSIVE, NEED_REFERENCE, PARAMETER_METHODS, Problem, Sides
from sae.weights.objective import margin_objective, passage_of, reply_objective

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
N_PROMPTS, REPLY_TOKENS = 16, 8
PASSES = ("forward", "gradients")


def save_model(folder: Path, layers: int, d_model: int, seed: int = 0) -> None:
    """Write a random Llama whose blocks are like those of small models: heads of 64, an MLP three times as wide."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=layers,
        num_attention_heads=d_model // 64, num_key_value_heads=d_model // 64, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(run: Callable[[], Any], before: int) -> tuple[int, float]:
    """Bytes above `before` that a call needs at most, and its seconds."""
    gc.collect()
    top, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            top[0] = max(top[0], resident())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        run()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return max(0, top[0] - before), seconds


def problem(lm: Any) -> Problem:
    """What methods are given: a margin that means nothing, and the model's own replies."""
    records = load_contrast(
        [
            {
                "messages": [{"role": "user", "content": f"please do number {index} now"}],
                "label": index % 2,
                "topic": str(index // 2),
                "behavior_texts": ["no"],
                "alternative_texts": ["yes"],
            }
            for index in range(2 * N_PROMPTS)
        ],
        "made up",
    )
    matrices = block_matrices(lm)
    shown, harmless = (
        passage_of(own_replies(lm, prepare(lm, some), REPLY_TOKENS), lm.pad_id)
        for some in (records.positives, records.negatives)
    )
    return Problem(
        lm, matrices, margin_objective(lm, records.positives, matrices), reply_objective(lm, harmless, matrices),
        shown, harmless, prepare_margins(lm, records.positives), ig_steps=2,
    )  # fmt: skip


def measure(name: str, tiny: Path, folder: Path, reference: Path) -> None:
    """Load the model, run one pass or method, print a line."""
    load_lm(str(tiny), device="cpu")  # so that libraries are there before the count begins
    gc.collect()
    before = resident()
    lm = load_lm(str(folder), device="cpu")
    unit = sum(4 * values.numel() for values in lm.bridge.original_model.parameters())
    given = problem(lm)
    if name in NEED_REFERENCE:
        given.reference = open_reference(str(reference), lm, given.matrices, None).weights
    made: list[Sides] = []
    steps: list[Callable[[], Any]] = {
        "forward": [given.behavior.values],
        "gradients": [lambda: given.behavior.gradients(lambda matrix, share: None)],
    }.get(
        name, [lambda: made.append(Sides(name, given)), lambda: [made[0].scores(one) for one in made[0].variants[1:]]]
    )
    found = [peak(step, before) for step in steps]
    sizes = "  ".join(f"{size / unit:.2f}x" for size, _ in found)
    print(f"{name:22} {sizes:14} {sum(seconds for _, seconds in found):6.1f} s", flush=True)


CHEAP = [*PASSES, *(name for name in PARAMETER_METHODS if name not in EXPENSIVE)]


def main() -> None:
    """Make the model, run the passes, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--only", nargs="*", default=CHEAP, help="passes and methods")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder) / name for name in ("tiny", "model", "reference")]
        save_model(models[0], 1, 64)
        save_model(models[1], options.layers, options.d_model)
        save_model(models[2], options.layers, options.d_model, seed=1)
        print(f"{'':22} scored  differences", flush=True)
        for name in options.only:
            child = multiprocessing.get_context("spawn").Process(target=measure, args=(name, *models))
            child.start()
            child.join()


if __name__ == "__main__":
    main()
