"""Settings of the behaviour protocol, all in one place."""

from dataclasses import dataclass

from sae.behavior.select import EDIT_ROLES, MULTIPLES
from sae.errors import UserError
from sae.lm.tokens import Role


@dataclass(frozen=True)
class BehaviorSettings:
    """How a behaviour is searched for and tested. Prompts are counted per class.

    Attributes:
        positions: where latents and directions are read: -1 is the prompt's last token, ``"max"`` the prompt's maximum
            (latents only).
        fdr: largest q-value and family-wise p-value of a significant latent.
        n_permutations, n_bootstrap: draws for family-wise p-values and for intervals.
        top_n: latents listed per SAE.
        n_candidates: latents per SAE tried in the causal search.
        beam: candidates kept after the search's first round.
        max_latents: largest set ablated or clamped.
        n_stability: resamples of the topics, and halves of them, on which the ranking is repeated; 0 for none.
        null_runs: rankings of shuffled labels; 0 for none.
        n_steps: steps of the integrated gradient's path in the table of candidates.
        n_agreement: latents drawn by density, on which attributions are compared with measured effects; 0 for none.
        output_dose: what the output score writes, in typical activations.
        sparse_ks: latents of the k-sparse probes among the rivals.
        n_interaction: latents ablated in pairs, the chosen ones first; 0 for none.
        multiples: clamp doses searched, in units of typical active values.
        n_doses: doses over the range in which the latents are by themselves; see `sae.behavior.doses`.
        doses: more of them, in the same units and of both signs; those within that range are left out.
        max_degenerate: largest share of broken replies a clamp may cause on the select split.
        roles: kinds of token that are edited; None is all but padding.
        filter: keep only prompts on which the unsteered model does what the label says.
        shuffle_labels: shuffle labels after filtering: a check of the protocol, which must then find nothing.
        n_prompts: prompts in the find and report splits, at most.
        n_prompts_select, n_prompts_random, n_prompts_dose, n_prompts_kl: prompts of the select split, of each random
            draw, of each dose, and for KL.
        n_random: draws per control for the main result.
        n_random_per_size: the same for the other dictionary sizes; 0 leaves their controls out.
        n_random_dose: random latents given the whole dose grid.
        n_neighbours: pool of nearest latents that matched ones are drawn from.
        n_prompts_cost: prompts of each kind on which every method's cost is measured.
        kl_tokens: tokens of the clean continuation over which KL is averaged: damage that the first hides shows later.
        max_new_tokens: length of replies.
        batch_prompts: rows run at once, a prompt measured under several interventions being several; lower it if
            memory runs out.
        n_examples: example replies kept per intervention.
        seed: of everything random.
    """

    positions: tuple[int | str, ...] = (-1,)
    fdr: float = 0.01
    n_permutations: int = 1000
    n_bootstrap: int = 500
    top_n: int = 20
    n_candidates: int = 12
    beam: int = 6
    max_latents: int = 5
    n_stability: int = 50
    null_runs: int = 50
    n_steps: int = 10
    n_agreement: int = 48
    output_dose: float = 1.0
    sparse_ks: tuple[int, ...] = (1, 5, 20)
    n_interaction: int = 8
    multiples: tuple[float, ...] = MULTIPLES
    n_doses: int = 9
    doses: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
    max_degenerate: float = 0.1
    roles: tuple[Role, ...] | None = EDIT_ROLES
    filter: bool = True
    shuffle_labels: bool = False
    n_prompts: int = 256
    n_prompts_select: int = 64
    n_prompts_random: int = 64
    n_prompts_dose: int = 64
    n_prompts_kl: int = 64
    n_random: int = 200
    n_random_per_size: int = 20
    n_random_dose: int = 5
    n_neighbours: int = 50
    n_prompts_cost: int = 32
    kl_tokens: int = 32
    max_new_tokens: int = 24
    batch_prompts: int = 256
    n_examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (
            "max_latents",
            "n_candidates",
            "n_prompts",
            "n_prompts_select",
            "max_new_tokens",
            "batch_prompts",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "n_prompts_random",
            "n_prompts_dose",
            "n_prompts_kl",
            "n_prompts_cost",
            "kl_tokens",
            "n_neighbours",
            "beam",
            "top_n",
            "n_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "n_random",
            "n_random_per_size",
            "n_random_dose",
            "n_permutations",
            "n_bootstrap",
            "n_examples",
            "n_stability",
            "null_runs",
            "n_agreement",
            "n_interaction",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0.")
        if not any(isinstance(position, int) for position in self.positions):
            raise UserError(f"positions={self.positions}: give at least one like -1, where a direction can be read.")
        if not 0 < self.fdr < 1:
            raise UserError(f"fdr={self.fdr} is not between 0 and 1.")
        if self.n_permutations and 1 / (1 + self.n_permutations) > self.fdr:
            raise UserError(
                f"n_permutations={self.n_permutations} cannot show p <= fdr={self.fdr}: give at least "
                f"{round(1 / self.fdr)}, or 0 for none."
            )
        if self.output_dose <= 0:
            raise UserError(f"output_dose={self.output_dose}: give a positive number of typical activations.")
        if any(k < 1 for k in self.sparse_ks):
            raise UserError(f"sparse_ks={self.sparse_ks}: give numbers of latents of at least 1, or () for none.")
        if self.n_doses < 3:
            raise UserError(f"n_doses={self.n_doses} show no trend: give at least 3.")
        if not self.multiples or min(self.multiples) <= 0:
            raise UserError(f"multiples={self.multiples}: give positive doses to search; signs belong in doses.")
