"""What the suites of `sae eval` share: which SAEs are measured, what stands beside them, how a result is written.

The SAEs are the run's own (trained first where they are not) or those that `eval.saes` names. Where none of them is a
control, most suites put a random SAE beside each (`sae.train.baseline`), so that no figure stands alone.

Refusals come before any text is read and anything trained, or at least before an older result is touched.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae.autoencoder.sae import SAE, SAEConfig, read_config
from sae.config import RunConfig
from sae.files import write_json, write_manifest, write_tensors
from sae.lm.model import LanguageModel
from sae.lm.tokens import PackedTokens
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.harvest import Tokens, ensure_tokens
from sae.stages.opened import opened_saes
from sae.stages.train import ensure_trained, make_grid
from sae.train.controls import NO_CONTROL, control_of
from sae.train.grid import SAESpec

RANDOM = "random"
LATENTS = "latents"
"""Folder of a suite's tensors."""

Check = Callable[[Sequence[SAESpec | SAEConfig]], object]
"""Raises a `UserError` where a suite cannot measure these SAEs, to be trained or there already."""


class Measured(NamedTuple):
    """One SAE that is measured."""

    sae: SAE
    path: Path
    """Its folder; of a random SAE that is on no disk, the folder of the one it stands beside."""
    control: str
    """`NO_CONTROL`, or the control it is."""
    on_the_spot: bool = False
    """Whether it was made only to stand beside another."""

    def about(self) -> dict[str, Any]:
        """How a row of the result begins."""
        config = self.sae.config
        return {
            "path": None if self.on_the_spot else str(self.path),
            "beside": str(self.path) if self.on_the_spot else None,
            "hook_name": config.hook_name,
            "architecture": config.architecture,
            "d_sae": config.d_sae,
            "l0_target": config.l0,
            "control": self.control,
            "seed": config.seed,
        }


class Table(NamedTuple):
    """What is printed, and put into the metric sink; nothing where there is no row."""

    name: str
    columns: Sequence[str]
    rows: Sequence[dict[str, Any]]


@dataclass
class Work:
    """A suite that is to be done: its SAEs, its folder, and what its manifest will say."""

    config: RunConfig
    folder: Path
    settings: dict[str, Any]
    inputs: dict[str, str]
    configs: dict[Path, SAEConfig]
    """What is measured, by its folder."""
    clock: common.Clock
    tokens: Tokens | None
    device: str
    """Where SAEs are held."""
    saes: list[Measured] = field(default_factory=list)
    """The SAEs, once `open` has loaded them."""
    n_files: int = 0

    @property
    def held_out(self) -> PackedTokens:
        """The held-out tokens, of a suite that said it reads them."""
        assert self.tokens is not None
        return self.tokens.corpus.held_out

    @property
    def wants_baselines(self) -> bool:
        """Whether random SAEs are to be made: the run has no controls of its own."""
        return all(item.control == NO_CONTROL for item in self.saes)

    def open(self, hold: bool = True) -> None:
        """Load the SAEs; then open the folder for writing, which counts as unfinished from here on.

        Args:
            hold: keep them all in `saes`. False only tries each of them, for a suite that loads a few at a time.

        Raises:
            UserError: an SAE whose weights are missing or spoilt; the folder is as it was.
        """
        for path in self.configs:
            sae = SAE.load(path, self.device if hold else "cpu")
            if hold:
                self.saes.append(Measured(sae, path, control_of(sae.config) or NO_CONTROL))
        common.skip(self.config, self.folder, self.settings, self.inputs)
        shutil.rmtree(self.folder / LATENTS, ignore_errors=True)  # of an earlier result, maybe of more SAEs

    def write_tensors(self, tensors: Mapping[str, Tensor]) -> str:
        """Write figures of every latent into a file of the folder; return its name, for the result.

        Files are numbered: what they are about may be too long for a name.
        """
        name = f"{LATENTS}/{self.n_files:04d}.safetensors"
        write_tensors(self.folder / name, tensors)
        self.n_files += 1
        return name

    def finish(self, result: Mapping[str, Any], tables: Sequence[Table], note: str | None = None) -> None:
        """Write the result and its manifest, and print the tables.

        Args:
            result: what `result.json` holds, besides `schema_version`, `suite` and `wall_s`.
            tables: those that have rows are printed.
            note: printed below them.
        """
        suite, path = self.config.suite, self.folder / "result.json"
        wall = self.clock.seconds()
        filled = [table for table in tables if table.rows]
        write_json(path, {"schema_version": 1, "suite": suite, **result, "wall_s": wall})
        with common.open_sink(self.config, self.folder, f"eval-{suite}") as sink:
            for name, columns, rows in filled:
                sink.table(name, list(columns), [[row.get(column) for column in columns] for row in rows])
        write_manifest(self.folder, "eval", self.settings, self.inputs)
        for text in (*(summary_table(table.rows, table.columns) for table in filled), note):
            if text:
                print(text)
        print(f"{path}: {len(self.configs)} SAEs in {wall:.1f} s")


def find(
    config: RunConfig,
    lm: LanguageModel,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    *,
    held_out: bool = False,
    check: Check = lambda saes: None,
    needs_saes: bool = True,
) -> Work | None:
    """Find the SAEs, without their weights, and leave the suite's folder as it is; None when it was done before.

    Args:
        config: the run.
        lm: the model.
        settings: what the result depends on, of the configuration, besides the SAEs.
        inputs: what it depends on besides the model, the SAEs and the held-out tokens, as hashes.
        held_out: whether it depends on the held-out tokens.
        check: refuses SAEs that the suite cannot measure, before any text is read or anything trained.
        needs_saes: False where the model alone shows that nothing can be measured: nothing is trained then.

    Raises:
        UserError: an SAE that is not there, does not fit the model, or does not pass the check.
    """
    given = opened_saes(config, config.eval.saes)
    configs = {path: read_config(path) for path in given}
    for path, one in configs.items():
        common.check_belongs(lm, one, path, force=config.eval.force)
    check([*configs.values()] if given else make_grid(config, lm))
    if not needs_saes:
        configs = {}
    elif not given:
        configs = {path: read_config(path) for path in ensure_trained(common.as_needed(config), lm)}
    tokens = ensure_tokens(common.as_needed(config), lm) if held_out else None
    clock = common.Clock()
    folder = common.eval_folder(config) / config.suite
    known = {"suite": config.suite, "saes": [str(path) for path in given], "force": config.eval.force, **settings}
    found = {"lm": common.model_key(lm)} | dict(inputs or {}) | common.sae_inputs(configs, folder)
    if tokens is not None:
        known["include_special"] = config.data.include_special
        found["tokens"] = tokens.fingerprint
    if common.is_kept(config, folder, known, found):
        common.skip(config, folder, known, found)
        return None
    return Work(config, folder, known, found, configs, clock, tokens, lm.device)


def identity(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that tell the rows of a table apart: target L0 and seed where the SAEs on disk differ in them."""
    saes = [row for row in rows if row["path"] is not None]
    names = [name for name in ("l0_target", "seed") if len({row[name] for row in saes}) > 1]
    return ["hook_name", "architecture", "d_sae", *names, "control"]


def beside(saes: Sequence[Measured], randoms: Sequence[SAE]) -> Iterator[Measured]:
    """Each SAE, followed by the random one that was made for it."""
    for item, random in zip(saes, randoms, strict=True):
        yield item
        yield Measured(random, item.path, RANDOM, on_the_spot=True)
