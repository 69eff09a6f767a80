"""How well every attribution method finds what is planted in the organism, over several seeds.

    python scripts/weights_table.py --seeds 3

Runs `sae localize` with other prompts for each seed (a run that is there already is kept) and prints one Markdown table
a level: means over the seeds, and the least and the most of them, of AUPRC and AUROC, by method and behaviour.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from sae.cli import main as sae
from sae.organism.corpus import BEHAVIORS

METHODS = "taylor,snip,integrated_gradients,fisher,wanda,act_svd"
LEVELS = "parameter,row,neuron,head"


def measured(args, seed):
    """The rows of one seed."""
    name = f"weights-table-s{seed}"
    sae(
        [
            "localize", f"runs={args.runs}", f"name={name}", "lm=organism", f"contrast=[{','.join(BEHAVIORS)}]",
            f"method=[{args.methods}]", f"level=[{args.levels}]", "localize.surgery=false", "localize.seeds=1",
            f"localize.budget={args.budget}", f"localize.threshold={args.threshold}", f"behavior.seed={seed}",
        ]
    )  # fmt: skip
    return json.loads((Path(args.runs) / name / "localize" / "result.json").read_text())["methods"]


def cell(rows):
    """Mean AUPRC [least, most] / mean AUROC [least, most]."""
    found = []
    for key in ("auprc", "auroc"):
        values = [row[key] for row in rows]
        found.append(f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
    return " / ".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--levels", default=LEVELS)
    parser.add_argument("--budget", type=int, default=1000, help="evaluations of methods that perturb")
    parser.add_argument("--threshold", type=float, default=0.001, help="share of the margin that makes a positive")
    parser.add_argument("--runs", default="runs")
    args = parser.parse_args()
    groups = defaultdict(list)
    for seed in range(args.seeds):
        for row in measured(args, seed):
            groups[row["level"], row["method"], row["behavior"]].append(row)
    for level in dict.fromkeys(key[0] for key in groups):
        rates = [f"{name} {groups[key][0]['base_rate']:.3f}" for key in groups for name in [key[2]] if key[0] == level]
        print(f"\n{level}: AUPRC / AUROC; base rates {', '.join(dict.fromkeys(rates))}\n")
        print(f"| method | {' | '.join(BEHAVIORS)} |\n|" + " --- |" * (1 + len(BEHAVIORS)))
        for method in dict.fromkeys(key[1] for key in groups if key[0] == level):
            print(f"| `{method}` | {' | '.join(cell(groups[level, method, name]) for name in BEHAVIORS)} |")


if __name__ == "__main__":
    main()
