"""What `sae localize method=decomposition` takes apart, and where it is kept.

One decomposition serves all behaviours of a run. It is trained on the find split's prompts of all their contrast sets,
with the model's own replies, and measured on the select split's; it lies in `localize/decomposition-<hash>/`, where an
interrupted run goes on with it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.behavior.contrast import ContrastSet
from sae.behavior.cost import own_replies
from sae.behavior.measure import prepare
from sae.config import DecompositionConfig
from sae.files import read_json, sha256_json, to_plain, write_json
from sae.lm.matrices import Matrix
from sae.lm.tokens import TokenBatch, pad
from sae.weights.decomposition.carriers import Carrier
from sae.weights.decomposition.components import Decomposition, check_size
from sae.weights.decomposition.evaluate import evaluate
from sae.weights.decomposition.saved import open_decomposition
from sae.weights.decomposition.settings import DecompositionSettings
from sae.weights.decomposition.target import LanguageTarget
from sae.weights.decomposition.train import decompose

REPLY_TOKENS = 8  # of the model's own replies
N_LISTED = 200  # components written for a behaviour
PARTIAL = 64  # prompts continued at once


def settings_of(options: DecompositionConfig) -> DecompositionSettings:
    """The settings that are the decomposition's own."""
    names = {field.name for field in dataclasses.fields(DecompositionSettings)}
    return DecompositionSettings(**{name: value for name, value in to_plain(options).items() if name in names})


class Decomposed:
    """A run's decomposition, made or opened when it is first asked for."""

    def __init__(
        self,
        options: DecompositionConfig,
        lm: Any,
        matrices: list[Matrix],
        sets: Mapping[str, ContrastSet],
        folder: Path,
    ) -> None:
        """Check the settings and name the folder.

        Raises:
            UserError: a model that is too large, settings out of range, or a named decomposition of another model.
        """
        self.options, self.lm, self.matrices, self.sets = options, lm, matrices, sets
        check_size(matrices)
        settings = settings_of(options)
        # What it is trained on, too: another contrast set is another folder, never a mix of both.
        made = [settings, options.n_prompts, options.batch, lm.fingerprint]
        self.key = sha256_json([made, {name: sha256_json(one.records) for name, one in sets.items()}])
        self.settings, self.given = settings, bool(options.folder)
        self.folder = Path(options.folder) if self.given else folder / f"decomposition-{self.key[:12]}"
        self._opened: Decomposition | None = None
        if self.given:
            self._opened = open_decomposition(self.folder, matrices, str(lm.fingerprint))
            self.key = sha256_json(read_json(self.folder / "decomposition.json"))
        self.key = sha256_json([self.key, options.n_measured])

    def open(self, progress: Any = None) -> Decomposition:
        """Open it, or make it."""
        if self._opened is None:
            target = LanguageTarget(self.lm, self.matrices, self._text("find"), self.options.batch)
            self._opened = decompose(target, self.settings, self.folder, progress=progress)
            held_out = LanguageTarget(self.lm, self.matrices, self._text("select"), self.options.batch)
            if not (self.folder / "evaluation.json").is_file():
                write_json(self.folder / "evaluation.json", evaluate(held_out, self._opened))
        return self._opened

    def evaluation(self) -> dict[str, Any] | None:
        """Its figures on the select split, where it has been measured."""
        path = self.folder / "evaluation.json"
        return read_json(path) if path.is_file() else None

    def _text(self, split: str) -> TokenBatch:
        """Prompts of both labels with the model's own replies."""
        rows = []
        for contrast in self.sets.values():
            part, n = contrast.split(split), self.options.n_prompts
            records = [*part.positives[:n], *part.negatives[:n]]
            for start in range(0, len(records), PARTIAL):
                replies = own_replies(self.lm, prepare(self.lm, records[start : start + PARTIAL]), REPLY_TOKENS)
                rows += [row for one in replies for row in one.batch.rows()]
        return pad(rows, padding_side="left", pad_id=self.lm.pad_id)


def write_carriers(folder: Path, decomposition: Path, carriers: Mapping[str, list[Carrier]]) -> None:
    """Write the components that carry a behaviour most, and where they lie."""
    listed = {side: found[:N_LISTED] for side, found in carriers.items()}
    write_json(folder / "decomposition.json", {"schema_version": 1, "decomposition": decomposition} | listed)
