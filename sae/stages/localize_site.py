"""What all methods that `sae localize` runs on one behaviour share: the model, its prompts, what is watched."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.cost import own_replies
from sae.behavior.judge import Judge
from sae.behavior.measure import prepare, prepare_margins
from sae.config import LocalizeConfig, RunConfig
from sae.errors import UserError
from sae.files import sha256_json
from sae.lm.load import load_lm
from sae.lm.matrices import Matrix, block_matrices
from sae.lm.model import LanguageModel
from sae.organism.truth import Truth, stage_one_weights
from sae.stages.decomposition import Decomposed
from sae.weights.adversary import Arena, Prompts, maskable
from sae.weights.edit import Weights
from sae.weights.methods import Problem
from sae.weights.objective import Passage, margin_objective, passage_of, reply_objective
from sae.weights.stored import Stored
from sae.weights.surgery import Watch, Watched, harmless, prepare_watch

STAGE_ONE = "stage_one"
DECOMPOSITION = "decomposition"
Records = Sequence[ContrastRecord]

REPLY_TOKENS = 8
"""Tokens of the model's own replies that the utility is the cross entropy of."""


@dataclass
class Site:
    """What is the same for all methods of one behaviour; surgery's part is prepared when first asked for."""

    config: RunConfig
    lm: LanguageModel
    contrast: ContrastSet
    others: dict[str, Watched]
    facts: tuple[Any, ...]
    judge: Judge
    matrices: list[Matrix]
    reference: Weights | None
    planted: Truth | None
    folder: Path
    key: str
    decomposed: Decomposed | None = None
    ready: Watch | None = None
    fight: Arena | None = None

    @property
    def options(self) -> LocalizeConfig:
        """The stage's section of the configuration."""
        return self.config.localize

    @property
    def mode(self) -> str:
        """What cut weights become."""
        return self.options.mode or ("zero" if self.reference is None else "restore")

    def key_of(self, method: str) -> str:
        """What a method's record depends on."""
        if method != DECOMPOSITION or self.decomposed is None:
            return self.key
        return sha256_json([self.key, self.decomposed.key])

    def watch(self) -> Watch:
        """What surgery is watched by."""
        if self.ready is None:
            self.ready = prepare_watch(
                self.lm, Watched(self.contrast, self.judge), self.others, self.facts,
                n_quick=self.options.n_prompts, n_prompts=self.options.n_report,
                max_new_tokens=self.config.behavior.max_new_tokens,
            )  # fmt: skip
        return self.ready

    def problem(self, progress: Any) -> Problem:
        """What methods are given."""
        lm, n = self.lm, self.options.n_prompts
        split = self.contrast.split("find")
        calm = harmless(lm, split.negatives, self.judge, n, self.config.behavior.max_new_tokens)
        if not calm:
            raise UserError(f"{lm.name!r} shows {self.contrast.behavior!r} on every negative prompt: add others.")
        due, other = split.positives[:n], self.replies(calm)
        batch = self.options.batch_prompts
        return Problem(
            lm, self.matrices, margin_objective(lm, due, self.matrices, batch),
            reply_objective(lm, other, self.matrices, batch), self.replies(due), other,
            prepare_margins(lm, due, batch), self.reference,
            ranks=(self.options.rank, self.options.rank), ig_steps=self.options.ig_steps, progress=progress,
            decomposition=None if self.decomposed is None else functools.partial(self.decomposed.open, progress),
            n_measured=self.options.decomposition.n_measured, scratch=self.folder,
        )  # fmt: skip

    def replies(self, records: Records) -> Passage:
        """The beginning of the model's own replies."""
        return passage_of(own_replies(self.lm, prepare(self.lm, records), REPLY_TOKENS), self.lm.pad_id)

    def arena(self, progress: Any) -> Arena | None:
        """Where located sets are put to their worst case; None if that is not asked for."""
        options, batch = self.options, self.options.batch_prompts
        if self.fight is None and options.adversary:
            splits = [self.contrast.split(name) for name in ("find", "select", "report")]
            counts = [(options.n_prompts + 1) // 2, (options.n_prompts + 1) // 2, options.n_report]
            new = self.config.behavior.max_new_tokens
            due: list[Records] = []
            calm: list[Records] = []
            for part, n in zip(splits, counts, strict=True):
                due.append(part.positives[:n])
                calm.append(harmless(self.lm, part.negatives, self.judge, n, new))
            matrices, parts = maskable(self.lm, self.matrices)

            def prompts(find: Records, select: Records, report: Records) -> Prompts:
                return Prompts(
                    margin_objective(self.lm, [*find, *select], matrices, batch),
                    margin_objective(self.lm, report, matrices, batch),
                )

            self.fight = Arena(
                matrices, parts, prompts(*due), prompts(*calm), options.epsilons, options.attack_steps,
                options.attack_restarts, options.n_random, progress=progress,
            )  # fmt: skip
        return self.fight


class Reference(NamedTuple):
    """Another model's matrices, and what identifies them."""

    weights: Weights | None
    fingerprint: str


def open_reference(
    name: str, lm: LanguageModel, matrices: list[Matrix], planted: Truth | None, folder: Path | None = None
) -> Reference:
    """The matrices of a reference: "" for none, "stage_one" for the organism before planting, or a model's name.

    They are kept on disk, in a folder that may be given.

    Raises:
        UserError: a model of other matrices, or stage one of a model that has no planted truth.
    """
    if not name:
        return Reference(None, "")
    own = {matrix.name: matrix.parameter.detach() for matrix in matrices}
    if name == STAGE_ONE:
        if planted is None:
            raise UserError(
                f"{lm.name!r} has no planted truth, hence no stage one: name a model as localize.reference."
            )
        parameters = {key: value.clone() for key, value in own.items()}
        return Reference(Stored((parameters | stage_one_weights(parameters, planted)).items(), folder), STAGE_ONE)
    base = load_lm(name, device=lm.device)
    other = {matrix.name: matrix.parameter.detach() for matrix in block_matrices(base)}
    for key, value in own.items():
        if key not in other or other[key].shape != value.shape:
            raise UserError(
                f"{name!r} has no matrix like {key!r} of {lm.name!r}: give a model of the same architecture."
            )
    return Reference(Stored(((key, other[key]) for key in own), folder), base.fingerprint)
