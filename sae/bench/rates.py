"""Suite `rates`: whether the default learning rate is near the best.

Our SAEs are trained on the activations of suite `quality`, as there, at multiples of the default rate
(`sae.train.optim.default_lr`) and for two lengths, a quarter of `bench.steps` and all of them. FVU divided by that at
the default rate is below 1 where the default is not the best of the five. L0 and the share of dead latents stand beside
it: FVU compares only at equal L0. Figures are means over seeds, in brackets the extremes of FVU, which say how much of
a difference is chance.
"""

import shutil
from pathlib import Path
from typing import Any

from sae.bench.learning import Task, learn, over_seeds, run_length, tasks
from sae.bench.options import BenchOptions
from sae.bench.process import OUR_DEFAULT, Worker, workers
from sae.report.progress import Progress
from sae.train.optim import default_lr

COLUMNS = ["data", "architecture", "n_steps", "multiple", "lr", "fvu", "ratio", "l0", "dead"]
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
DEFAULT = MULTIPLES.index(1.0)


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Train every architecture on every model's activations, at every rate and length."""
    rows = []
    try:
        with workers([OUR_DEFAULT], options) as alive:
            for task in tasks("rates", folder / "data", options):
                for steps in lengths(options):
                    rows += _sweep(alive[OUR_DEFAULT], task, options, steps)
    finally:
        shutil.rmtree(folder / "data", ignore_errors=True)
    return rows


def lengths(options: BenchOptions) -> list[int]:
    """Training steps of the runs, shortest first."""
    whole = run_length(options)
    return list(dict.fromkeys([max(1, whole // 4), whole]))


def _sweep(worker: Worker, task: Task, options: BenchOptions, steps: int) -> list[dict[str, Any]]:
    """A row for each multiple."""
    default = default_lr(task.case.d_in, task.case.d_sae, steps)
    seeds = range(options.seeds)
    rows = []
    with Progress(steps * len(MULTIPLES) * len(seeds), f"bench rates {task.label}, {steps} steps", unit="step") as bar:
        for multiple in MULTIPLES:
            found = [
                learn(worker, OUR_DEFAULT, task, options, n_steps=steps, lr=multiple * default, seed=seed, bar=bar)
                for seed in seeds
            ]
            said = found[0].said
            rows.append(
                {
                    **task.columns,
                    "n_steps": steps,
                    "multiple": multiple,
                    "lr": multiple * default,
                    **over_seeds(found),
                    "n_seeds": options.seeds,
                    "threads": options.threads,
                    "dtype": said["dtype"],
                    "kernels": said["kernels"],
                    "options": said["options"],
                }
            )
    for row in rows:
        row["ratio"] = row["fvu"] / rows[DEFAULT]["fvu"]
    return rows
