"""`sae harvest`: text -> tokens -> one pass of the language model -> shuffled shards of activations on disk.

Writes `<run>/tokens/` (training and held-out rows) and `<run>/harvest/` (the store). Both are skipped when they are
there already; a harvest that was killed goes on where it was. In a multirun the store made for the run is shared.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sae.activations.harvest import Corpus, Passes, harvest, load_corpus, prepare, save_corpus
from sae.activations.store import StoreInfo, StoreReader
from sae.config import RunConfig
from sae.files import is_done, sha256_file, write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common


class Tokens(NamedTuple):
    """The token artefact."""

    folder: Path
    corpus: Corpus
    fingerprint: str


def ensure_tokens(config: RunConfig, lm: LanguageModel) -> Tokens:
    """Tokenise the text, or read the tokens that are there already."""
    settings = {"data": config.data, "chat_template": config.lm.chat_template}
    inputs = {"lm": lm.fingerprint, "data": common.data_fingerprint(config.data)}
    folder = _shared(config, "tokens", settings, inputs)
    if config.force or not is_done(folder, settings, inputs):
        documents = common.open_documents(config.data)
        corpus = prepare(
            lm,
            documents,
            ctx_len=config.data.ctx_len,
            packing=config.data.packing.value,
            n_tokens=config.data.n_tokens,
            n_held_out_tokens=config.data.n_eval_tokens,
        )
        save_corpus(folder, corpus)
        write_manifest(folder, "tokens", settings, inputs)
    fingerprint = "".join(sha256_file(folder / f"{side}.safetensors")[:32] for side in Corpus._fields)
    return Tokens(folder, load_corpus(folder), fingerprint)


def make_passes(config: RunConfig, lm: LanguageModel, tokens: Tokens) -> Passes:
    """The forward passes over the training tokens."""
    return Passes(
        lm,
        tokens.corpus.train,
        common.pick_hooks(config, lm),
        batch_tokens=config.harvest.batch_tokens,
        include_special=config.data.include_special,
    )


def ensure_store(config: RunConfig, lm: LanguageModel) -> tuple[Path, StoreInfo]:
    """Harvest, or open the store that is there already."""
    clock = common.Clock()
    tokens = ensure_tokens(config, lm)
    passes = make_passes(config, lm, tokens)
    settings = {
        "lm_dtype": config.lm.dtype,
        "hook_names": passes.hook_names,
        "shard_tokens": config.harvest.shard_tokens,
        "batch_tokens": config.harvest.batch_tokens,
        "dtype": config.harvest.dtype,
        "seed": config.harvest.seed,
        "include_special": config.data.include_special,
    }
    inputs = {"lm": lm.fingerprint, "tokens": tokens.fingerprint}
    folder = _shared(config, "harvest", settings, inputs)
    if common.skip(config, folder, settings, inputs):
        return folder, StoreReader(folder).info
    if (folder / "manifest.json").exists():  # of other settings, or done again by force
        shutil.rmtree(folder)
    with Progress(passes.n_tokens, "harvest", unit="tok") as bar:
        info = harvest(
            passes,
            folder,
            shard_tokens=config.harvest.shard_tokens,
            dtype=config.harvest.dtype,
            seed=config.harvest.seed,
            progress=common.counter(bar),
        )
    wall = clock.seconds()
    write_json(
        folder / "result.json",
        {
            "schema_version": 1,
            "lm": lm.name,
            "hook_names": info.hook_names,
            "n_tokens": info.n_tokens,
            "n_bytes": info.n_bytes,
            "n_shards": len(info.shard_rows),
            "held_out_tokens": int(tokens.corpus.held_out.mask.sum()),
            "wall_s": wall,
        },
    )
    write_manifest(folder, "harvest", settings, inputs)
    rows = [
        {
            "hook point": name,
            "d_in": info.d_in[name],
            "tokens": info.n_tokens,
            "MB": info.n_bytes / 1e6 / len(info.d_in),
        }
        for name in info.hook_names
    ]
    print(summary_table(rows, ["hook point", "d_in", "tokens", "MB"]))
    print(f"{folder}: {info.n_tokens:,} tokens at {len(rows)} hook points in {wall:.1f} s")
    return folder, info


def run(config: RunConfig) -> None:
    """Run the stage."""
    ensure_store(config, common.open_lm(config.lm))


def _shared(config: RunConfig, stage: str, settings: object, inputs: dict[str, str]) -> Path:
    """Where a stage's output goes: a job of a multirun takes the run's own if that is what it would make."""
    shared = config.shared_folder / stage
    return shared if is_done(shared, settings, inputs) else config.folder / stage
