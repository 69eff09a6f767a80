"""`sae eval suite=absorption`: do the latents for first letters stay silent on words that have latents of their own?

    sae eval suite=absorption name=mine

First-letter absorption (see `sae.evals.absorption`) on the words that the tokenizer has as one token. It needs a model
that knows letters, and a tokenizer with many words: where either is missing the result says so. Without the words
nothing is trained for it.
"""

from collections.abc import Sequence
from typing import Any

from sae.autoencoder.sae import SAEConfig
from sae.config import RunConfig
from sae.errors import UserError
from sae.evals.absorption import Thresholds, fit_probes, measurable
from sae.evals.first_letter import first_letter, first_letters, vocabulary_words, word_activations
from sae.lm.model import LanguageModel
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.stages.measured import Measured
from sae.train.baseline import random_like
from sae.train.grid import SAESpec

BATCH = 64
KNOWN_F1 = 0.5
"""Mean F1 of the probes for letters from which on a model is said to know them; chance is about 0.1."""


def run(config: RunConfig) -> None:
    """Run the suite."""
    lm = common.open_lm(config.lm)
    words = vocabulary_words(lm)
    # Figures are means over letters.
    enough = len(measurable(words, first_letters(words), seed=config.eval.seed)) >= 2
    work = measured.find(config, lm, {"seed": config.eval.seed}, check=_check_kinds, needs_saes=enough)
    if work is None:
        return
    work.open()
    rows = _measure(config, lm, work, words) if enough else []
    message = _message(lm, words, rows)
    columns = [*measured.identity(rows), "fraction", "full", "n_main", "n_letters", "probe_f1"]
    table = [row | {"n_letters": len(row["letters"])} for row in rows]
    status = "too_few_words" if not rows else "letters_unknown" if message else "measured"
    result = {"saes": rows, "status": status, "message": message, "n_words": len(words)}
    work.finish(result, [measured.Table(config.suite, columns, table)], message)


def _measure(config: RunConfig, lm: LanguageModel, work: measured.Work, words: list[str]) -> list[dict[str, Any]]:
    """Absorption of every SAE; the model reads the words once for all."""
    hooks = list(dict.fromkeys(item.sae.config.hook_name for item in work.saes))
    seed = config.eval.seed
    with Progress(-(-len(words) // BATCH), "read words", unit="batch") as bar:
        acts = word_activations(lm, words, hooks, batch_size=BATCH, seed=seed, progress=bar.update)
    letters = first_letters(words)
    probes = {hook: fit_probes(found, words, letters, seed=seed) for hook, found in acts.items()}
    items: list[Measured] = work.saes
    if work.wants_baselines:
        saes = [item.sae for item in work.saes]
        randoms = [random_like(sae, {sae.config.hook_name: acts[sae.config.hook_name]}) for sae in saes]
        items = list(measured.beside(work.saes, randoms))
    rows = []
    with Progress(len(items), "measure absorption", unit="SAE") as bar:
        for item in items:
            hook = item.sae.config.hook_name
            found = first_letter(lm, item.sae, words, acts=acts[hook], probes=probes[hook], seed=seed)
            rows.append(item.about() | found._asdict())
            bar.update()
    return rows


def _check_kinds(saes: Sequence[SAESpec | SAEConfig]) -> None:
    for sae in saes:
        if sae.site.kind != "sae":
            raise UserError(
                f"suite=absorption measures SAEs of one hook point, not {sae.hook_name!r}, a {sae.site.kind}: name the "
                "SAEs, eval.saes=[folder,...]."
            )


def _message(lm: LanguageModel, words: list[str], rows: list[dict[str, Any]]) -> str | None:
    """What keeps the figures from meaning anything; None where nothing does."""
    if not rows:
        return (
            f"the tokenizer of {lm.name!r} has {len(words)} words as one token, too few to measure absorption on: it "
            f"takes {Thresholds().min_words} or more to train on for each of two first letters or more; use a model "
            "with a larger vocabulary."
        )
    best = max(row["probe_f1"] for row in rows)
    if not best >= KNOWN_F1:
        return (
            f"{lm.name!r} hardly knows first letters: probes on its activations tell them with a mean F1 of {best:.2f} "
            f"(below {KNOWN_F1}), so these figures say little; use a larger model or a later hook point."
        )
    return None
