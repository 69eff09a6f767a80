"""What the suites of `sae eval` share: which SAEs are measured, what stands beside them, how a result is written.

The SAEs are the run's own (trained first where they are not) or those that `eval.saes` names. Where none of them is a
control, most suites put a random SAE beside each (`sae.train.baseline`), so that no figure stands alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae.autoencoder.sae import SAE, WEIGHTS_FILE
from sae.autoencoder.site import Site
from sae.config import RunConfig
from sae.errors import UserError
from sae.files import sha256_file, write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.train import ensure_trained, make_grid
from sae.train.controls import NO_CONTROL, control_of

RANDOM = "random"
IDENTITY = ("hook_name", "architecture", "d_sae", "control")
"""Columns that tell the rows of a table apart."""


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


@dataclass
class Work:
    """A suite that is to be done: its SAEs, its folder, and what its manifest will say."""

    config: RunConfig
    folder: Path
    settings: dict[str, Any]
    inputs: dict[str, str]
    saes: list[Measured]
    clock: common.Clock

    @property
    def wants_baselines(self) -> bool:
        """Whether random SAEs are to be made: the run has no controls of its own."""
        return all(item.control == NO_CONTROL for item in self.saes)

    def finish(
        self,
        result: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[str],
        note: str | None = None,
    ) -> None:
        """Write the result and its manifest, and print a table.

        Args:
            result: what `result.json` holds, besides `schema_version` and `wall_s`.
            rows: of the table, which is printed where it has any.
            columns: of the table.
            note: printed below it.
        """
        suite, path = self.config.suite, self.folder / "result.json"
        write_json(path, {"schema_version": 1, "suite": suite, **result, "wall_s": self.clock.seconds()})
        with common.open_sink(self.config, self.folder, f"eval-{suite}") as sink:
            sink.table(suite, list(columns), [[row.get(name) for name in columns] for row in rows])
        write_manifest(self.folder, "eval", self.settings, self.inputs)
        for text in (summary_table(rows, columns) if rows else None, note):
            if text:
                print(text)
        print(f"{path}: {len(self.saes) if rows else 0} SAEs in {self.clock.seconds():.1f} s")


def begin(
    config: RunConfig,
    lm: LanguageModel,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    only_saes: bool = False,
) -> Work | None:
    """Find the SAEs and open the suite's folder; None when it was done before.

    Args:
        config: the run.
        lm: the model.
        settings: what the result depends on, of the configuration, besides the SAEs.
        inputs: what it depends on besides the model and the SAEs, as hashes.
        only_saes: whether transcoders and crosscoders are refused.

    Raises:
        UserError: an SAE that is not there, does not fit the model, or is not of the kind that the suite measures.
    """
    given = [Path(text) for text in config.eval.saes]
    if only_saes and not given:
        _check_kinds(config, (spec.hook_name for spec in make_grid(config, lm)))
    paths = given or ensure_trained(config, lm)
    clock = common.Clock()
    found = {"lm": common.model_key(lm)} | dict(inputs or {})
    found |= {str(path): sha256_file(path / WEIGHTS_FILE) for path in paths}
    folder = common.eval_folder(config) / config.suite
    known = {"suite": config.suite, "saes": config.eval.saes, "force": config.eval.force, **settings}
    # Before anything is touched: an SAE that does not fit leaves the old result as it was.
    saes = [SAE.load(path, device=lm.device) for path in paths]
    for path, sae in zip(paths, saes, strict=True):
        common.check_belongs(lm, sae, path, force=config.eval.force)
    if only_saes:
        _check_kinds(config, (sae.config.hook_name for sae in saes))
    if common.skip(config, folder, known, found):
        return None
    measured = [
        Measured(sae, path, control_of(sae.config) or NO_CONTROL) for path, sae in zip(paths, saes, strict=True)
    ]
    return Work(config, folder, known, found, measured, clock)


def beside(saes: Sequence[Measured], randoms: Sequence[SAE]) -> Iterator[Measured]:
    """Each SAE, followed by the random one that was made for it."""
    for item, random in zip(saes, randoms, strict=True):
        yield item
        yield Measured(random, item.path, RANDOM, on_the_spot=True)


def _check_kinds(config: RunConfig, hook_names: Iterable[str]) -> None:
    for name in hook_names:
        kind = Site.parse(name).kind
        if kind != "sae":
            raise UserError(
                f"suite={config.suite} measures SAEs of one hook point, not {name!r}, a {kind}: name the SAEs, "
                "eval.saes=[folder,...]."
            )
