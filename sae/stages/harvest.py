"""`sae harvest`: text -> tokens -> one pass of the language model -> shuffled shards of activations on disk.

Writes `<run>/tokens/` (training and held-out rows) and `<run>/harvest/` (the store). Both are skipped when they are
there already; a harvest that was killed goes on where it was. In a multirun the store made for the run is shared.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sae.activations.harvest import Corpus, Passes, harvest, load_corpus, prepare, save_corpus
from sae.activations.layout import format_bytes, row_bytes
from sae.activations.store import StoreInfo, StoreReader, estimate_bytes
from sae.config import RunConfig
from sae.errors import UserError
from sae.files import is_done, lock, sha256_file, sha256_json, write_json, write_manifest
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
    if config.data.ctx_len > lm.ctx_len:
        raise UserError(
            f"data.ctx_len={config.data.ctx_len} is more than {lm.name!r} takes: give {lm.ctx_len} or less."
        )
    settings = {"data": config.data}
    inputs = {"lm": common.model_key(lm), "data": common.data_fingerprint(config.data)}
    folder = _place(config, "tokens", settings, inputs)
    with lock(folder, common.say_waiting):
        again = config.force and not config.job
        if again or not is_done(folder, settings, inputs):
            if not again and (folder / common.MANIFEST).is_file():
                common.skip(config, folder, settings, inputs, replace=False)
            corpus = prepare(
                lm,
                common.open_documents(config.data),
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


def store_settings(config: RunConfig, hook_names: list[str]) -> dict[str, object]:
    """What a store depends on, besides the model and the tokens."""
    return {
        "hook_names": hook_names,
        "shard_tokens": config.harvest.shard_tokens,
        "batch_tokens": config.harvest.batch_tokens,
        "dtype": config.harvest.dtype,
        "seed": config.harvest.seed,
        "include_special": config.data.include_special,
    }


def ensure_store(config: RunConfig, lm: LanguageModel) -> Path:
    """Harvest, or find the store that is there already. Return its folder."""
    clock = common.Clock()
    tokens = ensure_tokens(config, lm)
    passes = make_passes(config, lm, tokens)
    settings = store_settings(config, passes.hook_names)
    inputs = {"lm": common.model_key(lm), "tokens": tokens.fingerprint}
    folder = _place(config, "harvest", settings, inputs)
    with lock(folder, common.say_waiting):
        if config.job and is_done(folder, settings, inputs):
            return folder  # another job of the multirun, or `sae harvest`, made it
        if common.skip(config, folder, settings, inputs, replace=False):
            return folder
        if config.force:
            shutil.rmtree(folder, ignore_errors=True)
        identity = sha256_json([settings, inputs])
        info = _finished(folder, identity) or _harvest(config, passes, folder, identity)
        _write_result(folder, lm, info, int(tokens.corpus.held_out.mask.sum()), clock.seconds())
        write_manifest(folder, "harvest", settings, inputs)
    return folder


def _finished(folder: Path, identity: str) -> StoreInfo | None:
    """A store that was complete when its process was killed, just before the manifest was written."""
    if not (folder / "store.json").is_file():
        return None
    info = StoreReader(folder).info
    return info if info.identity == identity else None


def _harvest(config: RunConfig, passes: Passes, folder: Path, identity: str) -> StoreInfo:
    size = format_bytes(estimate_bytes(passes.d_in, passes.n_tokens, config.harvest.dtype))
    print(f"{folder}: this will write about {size} ({passes.n_tokens:,} tokens, {config.harvest.dtype})", flush=True)
    with Progress(passes.n_tokens, "harvest", unit="tok") as bar:
        return harvest(
            passes,
            folder,
            shard_tokens=config.harvest.shard_tokens,
            dtype=config.harvest.dtype,
            seed=config.harvest.seed,
            identity=identity,
            progress=common.counter(bar),
        )


def _write_result(folder: Path, lm: LanguageModel, info: StoreInfo, held_out_tokens: int, wall_s: float) -> None:
    on_disk = sum(file.stat().st_size for file in folder.glob("shard-*/*.safetensors"))
    write_json(
        folder / "result.json",
        {
            "schema_version": 1,
            "lm": lm.name,
            "hook_names": info.hook_names,
            "dtype": info.dtype,
            "n_tokens": info.n_tokens,
            "n_bytes": info.n_bytes,
            "bytes_on_disk": on_disk,
            "bytes_per_token": info.bytes_per_token,
            "n_shards": len(info.shard_rows),
            "held_out_tokens": held_out_tokens,
            "wall_s": wall_s,
        },
    )
    rows = [
        [
            name,
            width,
            info.n_tokens,
            info.dtype,
            row_bytes(width, info.dtype),
            info.n_tokens * row_bytes(width, info.dtype) / 1e6,
        ]
        for name, width in info.d_in.items()
    ]
    print(summary_table(rows, ["hook point", "d_in", "tokens", "stored as", "bytes/token", "MB"]))
    print(
        f"{folder}: {info.n_tokens:,} tokens at {len(rows)} hook points in {wall_s:.1f} s, {format_bytes(on_disk)} on "
        f"disk ({info.bytes_per_token:,} bytes a token, its fields included)"
    )


def run(config: RunConfig) -> None:
    """Run the stage."""
    ensure_store(config, common.open_lm(config.lm))


def _place(config: RunConfig, stage: str, settings: object, inputs: dict[str, str]) -> Path:
    """Where tokens or a store go: all jobs of a multirun share the run's, unless it is of other settings."""
    shared = config.shared_folder / stage
    free = not (shared / common.MANIFEST).is_file()
    return shared if free or is_done(shared, settings, inputs) else config.folder / stage
