"""What the stages share: opening the model, naming hook points and folders, saying what was written."""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sae.autoencoder.sae import CONFIG_FILE, WEIGHTS_FILE, SAEConfig
from sae.autoencoder.site import PLUS, Site
from sae.config import DataConfig, LMConfig, RunConfig
from sae.errors import UserError
from sae.files import is_done, read_json, sha256_file, sha256_json, to_plain
from sae.lm.documents import Document, read_documents
from sae.lm.load import load_lm
from sae.lm.model import LanguageModel
from sae.lm.pair import PREFIX, PairedModel, bare, is_pairs
from sae.report import log
from sae.report.log import Sink
from sae.report.progress import Progress

ORGANISM = "organism"
MANIFEST = "manifest.json"
OTHER_SETTINGS = (
    "{folder!r} was made with other settings, text or model: choose another name=, repeat the settings it was made "
    "with, or replace it by `sae {stage} force=true`."
)
HASHED_BYTES = 2**30  # larger data files are identified by size and time of change


def open_lm(config: LMConfig) -> LanguageModel:
    """Load the configured language model, or both where `lm.pair` names a second one."""
    placed: dict[str, Any] = {
        "device": config.device,
        "dtype": config.dtype,
        "library": config.library,
        "device_map": config.device_map,
        "quantize": config.quantize,
    }
    lm = load_lm(config.name, chat_template=config.chat_template or None, **placed)
    return PairedModel(lm, load_lm(config.pair, **placed)) if config.pair else lm


def refuse_pair(config: LMConfig, stage: str) -> None:
    """For the stages that are about one model.

    Raises:
        UserError: there is a second one.
    """
    if config.pair:
        raise UserError(
            f"lm.pair={config.pair!r} gives a second model, but `sae {stage}` is about one: leave it out with "
            "lm.pair=null, in a run of its own."
        )


def check_hook(lm: LanguageModel, name: str) -> None:
    """Refuse a hook point that the model, or the second one, does not have.

    Raises:
        UserError: naming it.
    """
    if is_pairs(name) and not isinstance(lm, PairedModel):
        raise UserError(f"{name!r} is a hook point of a second model, but there is none: name it with lm.pair=... .")
    lm.check_hook(name)


def eval_folder(config: RunConfig) -> Path:
    """Where results on SAEs go: SAEs that `eval.saes` names must not take the place of the run's own."""
    return config.folder / "eval" / ("given" if config.eval.saes else "")


def check_belongs(
    lm: LanguageModel,
    config: SAEConfig,
    path: Path,
    *,
    force: bool,
    remedy: str = "eval.force=true measures it here",
) -> None:
    """Refuse an SAE that does not fit the model, or was trained on another one (saying what can be done then).

    Raises:
        UserError: a hook point or width that differs; or, unless `force`, another model's fingerprint.
    """
    for names, width in ((config.site.reads, config.d_in), (config.site.writes, config.width_out)):
        for name in names:
            check_hook(lm, name)
        found = sum(lm.d_in(name) for name in names)
        if found != width:
            raise UserError(
                f"{str(path)!r} is for activations {width} wide, but {' + '.join(names)} of {lm.name!r} is {found}: "
                "use an SAE trained there."
            )
    if config.lm_fingerprint and config.lm_fingerprint != lm.fingerprint and not force:
        raise UserError(f"{str(path)!r} was trained on {config.lm_name!r}, not on {lm.name!r}: {remedy}.")


def pick_sites(config: RunConfig, lm: LanguageModel) -> list[str]:
    """The configured sites: those named; else every hook point, crossed with the second model's where there is one."""
    if config.sae.sites:
        return list(config.sae.sites)
    names = pick_hooks(config, lm)
    if not isinstance(lm, PairedModel):
        return names
    return [f"{name}{PLUS}{PREFIX}{name}" for name in names if not is_pairs(name)]


def pick_hooks(config: RunConfig, lm: LanguageModel) -> list[str]:
    """The configured hook points, checked: those named; those of the SAEs' sites; or resid_post at 1/4, 1/2, 3/4.

    With a second model and no sites, each hook point is there in both.
    """
    named = list(config.harvest.hook_names)
    sites = list(dict.fromkeys(name for text in config.sae.sites for name in Site.parse(text).hooks))
    for name in sites if named else ():
        if name not in named:
            raise UserError(f"sae.sites names {name!r}, but harvest.hook_names={named} does not: add it, or leave out.")
    names = named or sites
    if not names:
        layers = sorted({-(-lm.n_layers * quarter // 4) - 1 for quarter in (1, 2, 3)})
        names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    if len(set(names)) < len(names):
        raise UserError(f"harvest.hook_names={names} names a hook point twice: give each once.")
    if isinstance(lm, PairedModel) and not sites:
        names = [twin for name in dict.fromkeys(map(bare, names)) for twin in (name, PREFIX + name)]
    for name in names:
        check_hook(lm, name)
    return names


def open_documents(config: DataConfig) -> Iterator[Document]:
    """The configured text: the organism's corpus, or whatever `data.path` names."""
    if config.path == ORGANISM:
        return _organism_documents(config.seed)
    return read_documents(config.path, kind=config.kind, text_field=config.text_field, split=config.split)


def _organism_documents(seed: int, block: int = 1_000) -> Iterator[Document]:
    """Chats in the organism's world, without end: the reader stops when it has enough tokens."""
    from sae.organism.corpus import documents

    for number in itertools.count():
        for chat in documents(block, seed * 1_000_003 + number):
            yield Document(messages=[dict(message) for message in chat])


def data_fingerprint(config: DataConfig) -> str:
    """Identify the text: content hashes for files, size and time for very large ones, the name otherwise."""
    path = Path(config.path).expanduser()
    if config.path == ORGANISM or not path.exists():
        return config.path
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        large = stat.st_size > HASHED_BYTES
        digest.update(f"{file.name} {stat.st_size} ".encode())
        digest.update((str(stat.st_mtime_ns) if large else sha256_file(file)).encode())
    return digest.hexdigest()


def model_key(lm: LanguageModel) -> str:
    """Identify all of a loaded model that can move a number: weights, precision, tokenizer, chat template."""
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)
    tokenizer = backend.to_str() if backend is not None else sorted(lm.tokenizer.get_vocab().items())
    return sha256_json([lm.fingerprint, str(lm.dtype), tokenizer, lm.tokenizer.chat_template])


def as_needed(config: RunConfig) -> RunConfig:
    """The run as a stage asks for what it is made of: `force=true` is for the stage that was named, and not passed on.

    To measure trained SAEs again must not delete them.
    """
    return dataclasses.replace(config, force=False)


def is_kept(config: RunConfig, folder: Path, settings: Any, inputs: dict[str, str]) -> bool:
    """Tell whether `skip` will find a stage's output there already; nothing is touched."""
    return not config.force and is_done(folder, settings, inputs)


def skip(config: RunConfig, folder: Path, settings: Any, inputs: dict[str, str], *, replace: bool = True) -> bool:
    """Tell whether a stage's output is there already, and say so; if not, open its folder for writing.

    From then on the folder counts as unfinished: its manifest is removed before anything else is touched.

    Args:
        config: the run.
        folder: the stage's folder.
        settings: what its output depends on, of the configuration.
        inputs: what it depends on besides, as hashes.
        replace: may a finished output of other settings be replaced? False for what took long to make.

    Raises:
        UserError: a finished output of other settings is there and may not be replaced.
    """
    if is_kept(config, folder, settings, inputs):
        print(f"{folder}: done before with these settings, kept (force=true does it again)")
        return True
    if not replace and not config.force and (folder / MANIFEST).is_file():
        raise made_otherwise(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    return False


def made_otherwise(folder: Path) -> UserError:
    """The refusal to replace what a stage made with other settings."""
    stage = "harvest" if folder.name == "tokens" else folder.name
    return UserError(OTHER_SETTINGS.format(folder=str(folder), stage=stage))


def noted_hash(file: Path, folder: Path, name: str) -> str:
    """Content hash of an input that may have been deleted since it was used.

    Args:
        file: the input.
        folder: the stage's folder. Where the file is gone, the hash that a finished stage noted in it stands for it.
        name: of the input in the stage's manifest.

    Returns:
        The hash; empty where the file is gone and was not noted.
    """
    if file.is_file():
        return sha256_file(file)
    manifest = folder / MANIFEST
    return str(read_json(manifest)["inputs"].get(name, "")) if manifest.is_file() else ""


def sae_inputs(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """Saved SAEs as inputs of a stage that works in `folder` (see `noted_hash`).

    The weights are named by the SAE's path, its config by that file's: the k of a top-k SAE is in no other place.
    """
    inputs = {}
    for path in paths:
        for name, file in ((str(path), path / WEIGHTS_FILE), (str(path / CONFIG_FILE), path / CONFIG_FILE)):
            inputs[name] = noted_hash(file, folder, name)
    return inputs


def say_waiting() -> None:
    """Say why nothing happens (for `sae.files.lock`)."""
    print("another process is working on this run: waiting for it to finish its part")


class Clock:
    """Wall time of a stage, in seconds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the stage began."""
        return round(time.perf_counter() - self._start, 2)


def open_sink(config: RunConfig, folder: Path, stage: str, resume_step: int | None = None) -> Sink:
    """Open the metric sink of a stage; see `sae.report.log.open_sink`."""
    return log.open_sink(
        folder,
        wandb_mode=config.log.wandb.value,
        project=config.log.project,
        name=f"{config.name}-{stage}",
        config=to_plain(config),
        group=config.name,
        resume_step=resume_step,
    )


def counter(bar: Progress) -> Callable[[int, int], None]:
    """Turn a bar, which counts increments, into the (done, all) callback the library's long loops take."""

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.done)

    return progress


def read_result(folder: Path) -> dict[str, Any]:
    """A stage's `result.json`."""
    found = read_json(folder / "result.json")
    assert isinstance(found, dict)
    return found


def is_organism(lm: LanguageModel) -> bool:
    """Tell whether a model speaks the organism's language: the shipped one, one trained anew, or its twin."""
    from sae.organism.tokenizer import vocabulary

    return set(lm.tokenizer.get_vocab()) == set(vocabulary())
