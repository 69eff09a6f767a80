"""Where the difference of means is taken decides what deleting it everywhere does: every hook point and position tried.

    python scripts/direction_places.py --lm refusing --contrast refusal_direction --root data --positions -5 -4 -3 -2 -1

Directions are fitted on the find split, and the one whose deletion lowers the margin most on the select split is what
`sae behavior` takes as `difference_of_means_everywhere`; the share restored is of the report split. Prompts on which
the model does not do what the label says are dropped, and final punctuation is stripped.
"""

import argparse

import sae
from sae.behavior.balance import balance
from sae.behavior.directions import difference_of_means
from sae.behavior.judge import Verdict
from sae.behavior.judges.registry import judge_for
from sae.behavior.measure import collect, evaluate, evaluate_each, margins_each, prepare, prepare_margins
from sae.behavior.sets.load import load_set
from sae.steering.directions import everywhere


def kept(lm, split, judge, n, new):
    """Positives on which the model shows the behaviour, and negatives on which it does not."""
    found = []
    for records, wanted in ((split.positives[:n], True), (split.negatives[:n], False)):
        verdicts = evaluate(lm, [], records, judge, new).verdicts if records else ()
        found.append([one for one, seen in zip(records, verdicts, strict=True) if (seen is Verdict.BEHAVIOR) is wanted])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--contrast", required=True, help="a set of configs/contrast/")
    parser.add_argument("--root", default="", help="where its data files are")
    parser.add_argument("--positions", nargs="+", type=int, default=[-5, -4, -3, -2, -1])
    parser.add_argument("--n", type=int, default=256, help="prompts a class and split, at most")
    parser.add_argument("--new", type=int, default=24, help="tokens of a reply")
    args = parser.parse_args()
    lm = sae.load_lm(args.lm)
    contrast = balance(load_set(args.contrast, root=args.root), "strip").contrast
    judge = judge_for(contrast.behavior, "")
    splits = {name: kept(lm, contrast.split(name), judge, args.n, args.new) for name in ("find", "select", "report")}
    due, calm = splits["find"]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(lm.n_layers)]
    seen = collect(lm, [], prepare(lm, [*due, *calm]), args.positions, hooks).resid
    labels = [True] * len(due) + [False] * len(calm)
    directions = {place: difference_of_means(acts, labels, *place) for place, acts in seen.items()}
    edits = [everywhere(lm, direction.vector) for direction in directions.values()]
    left = margins_each(lm, edits, prepare_margins(lm, splits["select"][0]))
    report = prepare(lm, splits["report"][0])
    print(f"{len(due)} and {len(calm)} prompts to fit on, {len(report.records)} to report on")
    print("| hook point | position | margin left, select split | restored, report split |\n| --- | --- | --- | --- |")
    outcomes = evaluate_each(lm, edits, report, judge, args.new)
    for (hook, position), margin, outcome in zip(directions, left, outcomes, strict=True):
        print(f"| {hook} | {position} | {margin.mean():.2f} | {outcome.alternative.rate:.2f} |")


if __name__ == "__main__":
    main()
