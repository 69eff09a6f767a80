"""`sae report`: write the run's page, `<run>/report.html`, from the results of whatever stages it has."""

from pathlib import Path

from sae.config import RunConfig, WandbMode
from sae.errors import UserError
from sae.report.html import write_report
from sae.stages import common


def write(config: RunConfig) -> Path:
    """Write the page, and hand it to wandb where that is on."""
    page = Path(write_report(config.folder))
    if config.log.wandb is not WandbMode.off:
        with common.open_sink(config, config.folder / "report", "report") as sink:
            sink.html("report", page)
    return page


def run(config: RunConfig) -> None:
    """Run the stage."""
    if not any((*config.folder.glob("*/result.json"), *config.folder.glob("eval/**/result.json"))):
        raise UserError(f"there is no result in {str(config.folder)!r}: give name= of a run in {config.runs!r}.")
    print(write(config))
