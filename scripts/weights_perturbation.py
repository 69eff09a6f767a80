"""How well perturbation methods find what is planted in the organism, against the evaluations they take.

    python scripts/weights_perturbation.py --methods adaptive,plain --budget 2000 --seeds 3 --out curves.jsonl
    python scripts/weights_perturbation.py --table curves.jsonl

Appends a line for every method, behaviour and seed to the file, and prints the table of all that is in it. Scores are
judged by AUROC among all heads, and among all neurons, against the planted truth: positive are parts whose return to
their values before planting takes more than 1% off the behaviour's margin (and, in the last column, more than 0.1%).
Prompts and draws change with the seed. The method `each` takes every part away by itself, whatever the budget;
`to_stage_one` is `adaptive` with the organism before planting as the reference.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import sae
from sae import stats
from sae.behavior.contrast import load_contrast
from sae.behavior.measure import prepare_margins
from sae.lm.matrices import block_matrices, heads, neurons
from sae.organism.corpus import contrast_records
from sae.organism.load import organism_folder
from sae.organism.truth import read_planted, stage_one_weights
from sae.weights.objective import margin_objective
from sae.weights.perturbation.margins import MarginMetric
from sae.weights.perturbation.registry import METHODS
from sae.weights.truth import effects_of, positives

SHARES = (0.01, 0.001)  # of the margin
COLUMNS = (100, 250, 500, 1000, 2000)


def positives_of(behavior, n, seed):
    """Some prompts on which the behaviour is due."""
    records = load_contrast(contrast_records(behavior, seed, 200), behavior).positives
    return [records[index] for index in np.random.default_rng(seed).permutation(len(records))[:n]]


def each(metric, matrices, parts, *, budget, seed):
    """Take every part away by itself: the exhaustive search that the others are to save; the budget is not kept."""
    return METHODS["adaptive"](metric, matrices, parts, budget=10**9, seed=seed, split=len(parts))


def to_stage_one(metric, matrices, parts, *, budget, seed):
    """The search with a reference: parts are taken back to the organism before planting."""
    own = {matrix.name: matrix.parameter.detach().clone() for matrix in matrices}
    base = own | stage_one_weights(own, read_planted(organism_folder()))
    return METHODS["adaptive"](metric, matrices, parts, budget=budget, seed=seed, reference=base)


def run(args):
    """Measure what is asked for and append it to the file."""
    lm, planted = sae.load_lm("organism"), read_planted(organism_folder())
    matrices = block_matrices(lm)
    levels = {"head": heads(lm, matrices), "neuron": neurons(lm, matrices)}
    parts = [*levels["head"], *levels["neuron"]]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for method in args.methods.split(","):
            for behavior in args.behaviors.split(","):
                records = positives_of(behavior, args.prompts, seed)
                extra = json.loads(args.options)
                if method == "gradient_directed":
                    extra["gradients"] = margin_objective(lm, records, matrices).gradient
                start = time.perf_counter()
                metric = MarginMetric(lm, prepare_margins(lm, records))
                found = (METHODS | {"each": each, "to_stage_one": to_stage_one})[method](
                    metric, matrices, parts, budget=args.budget, seed=seed, **extra
                )
                seconds = time.perf_counter() - start
                number = planted.layout.behaviors.index(behavior)
                effects = effects_of(planted, parts)
                truths = [positives(effects, planted, share)[:, number] for share in SHARES]
                record = {"method": method, "behavior": behavior, "seed": seed, "seconds": seconds, "curve": []}
                for point in found.curve:
                    owns = [np.array([part.level == level for part in parts]) for level in levels]
                    areas = [
                        float(stats.auroc(point.scores[own], positive[own])[0]) for positive in truths for own in owns
                    ]
                    record["curve"].append([point.evaluations, *areas])
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(method, behavior, seed, f"{seconds:.0f} s", record["curve"][-1], flush=True)


def table(path):
    """Print mean AUROC over seeds [least, most] by method, behaviour and level, at the snapshots up to some numbers."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"| method | behaviour | parts | seeds | {' | '.join(map(str, COLUMNS))} | last | last, above 0.1% |")
    print("|" + " --- |" * (len(COLUMNS) + 6))
    for method, behavior in dict.fromkeys((one["method"], one["behavior"]) for one in records):
        curves = [one["curve"] for one in records if (one["method"], one["behavior"]) == (method, behavior)]
        for column, level in ((1, "heads"), (2, "neurons")):
            cells = []
            for limit in COLUMNS:
                reached = [[point for point in curve if point[0] <= limit] for curve in curves]
                near = all(curve[-1][0] >= 0.99 * limit for curve in curves)  # no figure where a run stopped earlier
                at = [points[-1][column] for points in reached if points]
                cells.append(_cell(at) if near and at else "")
            last = [curve[-1] for curve in curves]
            most = f"{_cell([point[column] for point in last])} at {last[0][0]}"
            smaller = _cell([point[column + 2] for point in last if len(point) > 4])
            print(f"| {method} | {behavior} | {level} | {len(curves)} | {' | '.join(cells)} | {most} | {smaller} |")


def _cell(values):
    """Mean, and over several seeds the least and the most."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--behaviors", default="refusal,deception,style")
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="further arguments of the method, as JSON")
    parser.add_argument("--out", type=Path, default=Path("weights_perturbation.jsonl"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table is None:
        run(args)
    table(args.table or args.out)


if __name__ == "__main__":
    main()
