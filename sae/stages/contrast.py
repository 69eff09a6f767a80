"""What `sae behavior` and `sae audit` do with contrast sets before a model reads them: open, balance, audit.

`behavior.contrast` names sets: of the model organism, those described in `configs/contrast/`, or a file of one's own
(docs/contrast-sets.md). `behavior.files` and `behavior.root` say where their data are, `behavior.balance` what is done
about confounds.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sae.behavior.audit import Audit, audit
from sae.behavior.balance import Balanced, balance
from sae.behavior.contrast import ContrastRecord, ContrastSet, load_contrast
from sae.behavior.sets.load import load_set
from sae.behavior.sets.spec import TABLES, read_spec, set_names
from sae.config import RunConfig
from sae.errors import UserError, unknown
from sae.files import to_plain
from sae.lm.model import LanguageModel
from sae.organism.corpus import BEHAVIORS, contrast_records
from sae.report.terminal import summary_table
from sae.stages import common


class Opened(NamedTuple):
    """A set as it was read, and as it is used."""

    given: ContrastSet
    balanced: Balanced

    @property
    def contrast(self) -> ContrastSet:
        """The set that is used."""
        return self.balanced.contrast


def open_contrast(name: str, config: RunConfig, lm: LanguageModel | None) -> ContrastSet:
    """A contrast set by name or by path.

    Args:
        name: one of the organism's, of `configs/contrast/`, or a path.
        config: says where data files are.
        lm: the model that is to read it; None if none is.

    Raises:
        UserError: an unknown name, data that are not there, or the organism's behaviour asked of another model.
    """
    suffix = Path(name).suffix
    if suffix in (".jsonl", ".json"):
        return load_contrast(name)
    if name in BEHAVIORS:
        if lm is not None and not common.is_organism(lm):
            raise UserError(
                f"contrast set {name!r} is written in the model organism's words and {lm.name!r} is not one: "
                f"give behavior.contrast=[path/to/your.jsonl], or one of {', '.join(set_names())}."
            )
        return load_contrast([dict(record) for record in contrast_records(name, config.behavior.seed)], name)
    if _is_described(name):
        own = read_spec(name).files
        files = {key: path for key, path in config.behavior.files.items() if key in own}
        return load_set(name, files=files, root=config.behavior.root)
    raise unknown("contrast set", name, [*BEHAVIORS, *set_names()], "Or give the path of a .jsonl, .yaml or .csv file.")


def open_lookalikes(config: RunConfig, lm: LanguageModel | None) -> list[ContrastRecord]:
    """The negatives of `behavior.lookalikes`, none if it names no set.

    Only those of the report split: a set may share prompts with the one that is searched, and what latents and doses
    were chosen on must not measure their cost.

    Raises:
        UserError: what `open_contrast` raises, or no negatives in that split.
    """
    name = config.behavior.lookalikes
    if not name:
        return []
    found = [record for record in open_contrast(name, config, lm).negatives if record.split == "report"]
    if not found:
        raise UserError(f"behavior.lookalikes={name!r} has no negatives in its report split: add topics to it.")
    return found


def _is_described(name: str) -> bool:
    """Whether a set is a description or a table, whose data files have names."""
    return Path(name).suffix in (".yaml", ".yml", *TABLES) or name in set_names()


def open_contrasts(config: RunConfig, lm: LanguageModel | None) -> dict[str, Opened]:
    """Every configured set, balanced as configured, by the name of its behaviour; lengths in the model's tokens.

    Raises:
        UserError: what `open_contrast` raises, two sets of one behaviour, or a data file that no set reads.
    """
    options = config.behavior
    opened: dict[str, Opened] = {}
    for name in options.contrast:
        contrast = open_contrast(name, config, lm)
        if contrast.behavior in opened:
            raise UserError(
                f"two contrast sets are called {contrast.behavior!r}: give each a run of its own (name=...), or rename "
                "one of the files."
            )
        opened[contrast.behavior] = Opened(
            contrast,
            balance(
                contrast,
                options.balance,
                list(options.balance_features) or None,
                tokenizer=None if lm is None else lm.tokenizer,
                seed=options.seed,
            ),
        )
    provenances = [item.given.provenance for item in opened.values()]
    known = {file.name for provenance in provenances if provenance for file in provenance.files}
    known |= set(read_spec(options.lookalikes).files) if _is_described(options.lookalikes) else set()
    for name in options.files:
        if name not in known:
            raise unknown("key of behavior.files", name, sorted(known), "A set's YAML file names its data files.")
    return opened


def confounds(
    name: str, opened: Opened, *, tokenizer: Any = None, seed: int = 0, whole: bool = False
) -> dict[str, Any]:
    """Audit a set, print what was found, and return it as it stands in `result.json`.

    Args:
        name: of the behaviour.
        opened: the set.
        tokenizer: for lengths in tokens.
        seed: of the audit.
        whole: print every family, not only those that are flagged.
    """
    before = audit(opened.given, tokenizer=tokenizer, seed=seed)
    after = None
    _print(f"{name}, as it is", before, whole)
    if opened.balanced.method != "none":
        after = audit(opened.contrast, tokenizer=tokenizer, seed=seed)
        _print(_said(name, opened.balanced), after, whole)
    balanced = opened.balanced
    return {
        "flagged": list(before.flagged),
        "audit": to_plain(before),
        "balance": {
            "method": balanced.method,
            "features": list(balanced.features),
            "counts": to_plain(balanced.counts),
            "n_changed": balanced.n_changed,
            "length_unit": balanced.length_unit,
        },
        "after": None if after is None else {"flagged": list(after.flagged), "audit": to_plain(after)},
    }


def _said(name: str, balanced: Balanced) -> str:
    features = ", ".join(balanced.features) or "nothing"
    if balanced.method == "strip":
        return f"{name}, {features} stripped ({balanced.n_changed:,} prompts changed)"
    before, after = (
        sum(pair[index] for split in balanced.counts.values() for pair in split.values()) for index in (0, 1)
    )
    return f"{name}, matched on {features} ({after:,} of {before:,} prompts kept)"


def _print(what: str, found: Audit, whole: bool) -> None:
    rows = [
        {
            "read from": row.family,
            "AUROC": row.auroc.estimate,
            "low": row.auroc.low,
            "high": row.auroc.high,
            "flagged": row.flagged,
            "differs most in": next(iter(row.rates), ""),
            "positives": next((means.positives for means in row.rates.values()), None),
            "negatives": next((means.negatives for means in row.rates.values()), None),
        }
        for row in found.rows
        if whole or row.flagged
    ]
    surface = found.row("surface").auroc
    flagged = ", ".join(found.flagged) or "no family"
    print(
        f"\n{what}: on prompts held out, surface features tell the classes apart with AUROC {surface.estimate:.2f} "
        f"[{surface.low:.2f}, {surface.high:.2f}], words with {found.row('words').auroc.estimate:.2f}; "
        f"flagged above {found.bar}: {flagged}"
    )
    if rows:
        print(summary_table(rows, list(rows[0])))
