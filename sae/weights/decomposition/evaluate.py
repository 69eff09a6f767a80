"""How good a decomposition is: does the sum hold, how many components matter at a token, and are the rest dispensable?

Random masks are kind to a decomposition, since errors of many components that were called unimportant average out. So
the worst masks within the same bounds are searched for, too, by projected gradient ascent: the honest one of the two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.weights.decomposition import masks as drawing
from sae.weights.decomposition.components import Decomposition
from sae.weights.decomposition.forward import frozen, masked
from sae.weights.decomposition.masks import Masks
from sae.weights.decomposition.target import Target
from sae.weights.decomposition.train import clean_run, generator_at

ACTIVE = 0.1  # a component counts as important above this
HELD_OUT = 2**40  # batches of an evaluation are those of steps that no training comes to


class Report(NamedTuple):
    """A decomposition's figures; divergences are the target's (nats a token for language models).

    Attributes:
        faithfulness: mean over matrices of |W - sum|^2 / |W|^2.
        l0: mean number of components a token with an importance above 0.1, all matrices together.
        l0_of: the same by matrix.
        n_components, n_alive: how many there are, and how many are that important at any token of those looked at.
        stochastic: divergence under random masks.
        gated: with the importances as masks, nothing else kept.
        shuffled: the same with each token's importances dealt out to other components: what is due to which they are.
        adversarial: under the worst masks found between the importances and 1.
    """

    faithfulness: float
    l0: float
    l0_of: dict[str, float]
    n_components: int
    n_alive: int
    stochastic: float
    gated: float
    shuffled: float
    adversarial: float


def evaluate(
    target: Target, decomposition: Decomposition, n_batches: int = 4, pgd_steps: int = 20, pgd_rate: float = 0.1
) -> Report:
    """Measure a decomposition.

    Args:
        target: what was decomposed; its text may be other than the one trained on.
        decomposition: of it.
        n_batches: batches looked at.
        pgd_steps: of the search for the worst masks.
        pgd_rate: by how much a mask moves in one of them.
    """
    sums = {"stochastic": 0.0, "gated": 0.0, "shuffled": 0.0, "adversarial": 0.0}
    counts: dict[str, Tensor] = {}
    alive: dict[str, Tensor] = {}
    n_tokens = 0
    with frozen(target.root):
        for number in range(n_batches):
            generator = generator_at(decomposition.settings, HELD_OUT + number, target.device)
            batch = target.draw(generator)
            clean, inputs = clean_run(target, batch)
            real = target.real(batch)
            with torch.no_grad():
                importance = {name: one.masks for name, one in decomposition.importance(inputs).items()}
            for name, one in importance.items():
                flat = one.flatten(0, -2)
                on = (flat if real is None else flat[real.to(flat.device)]) > ACTIVE
                counts[name] = counts.get(name, 0) + on.sum()
                alive[name] = alive.get(name, False) | on.any(dim=0)
            n_tokens += len(on)
            drawn = {
                "stochastic": drawing.stochastic(importance, generator),
                "gated": drawing.gated(importance),
                "shuffled": drawing.shuffled(importance, generator),
                "adversarial": worst(
                    target, decomposition, batch, clean, importance, generator, pgd_steps, pgd_rate
                ),
            }  # fmt: skip
            for key, masks in drawn.items():
                with torch.no_grad(), masked(target.root, target.matrices, decomposition, masks):
                    sums[key] += float(target.divergence(clean, target.outputs(batch))) / n_batches
    l0_of = {name: float(one) / n_tokens for name, one in counts.items()}
    return Report(
        faithfulness=float(decomposition.unfaithfulness(target.matrices).detach()),
        l0=sum(l0_of.values()),
        l0_of=l0_of,
        n_components=decomposition.n_components,
        n_alive=sum(int(one.sum()) for one in alive.values()),
        **sums,
    )


def worst(
    target: Target,
    decomposition: Decomposition,
    batch: object,
    clean: Tensor,
    importance: dict[str, Tensor],
    generator: torch.Generator,
    steps: int = 20,
    rate: float = 0.1,
) -> Masks:
    """Return the worst masks found between the importances and 1, of every token and component by itself.

    Signed gradient ascent from random masks, each step cut back to the bounds; the worst masks on the way are kept.
    """
    free = drawing.stochastic({name: torch.zeros_like(one) for name, one in importance.items()}, generator)
    best, found = -1.0, free
    for step in range(steps + 1):
        leaves = [one.detach().requires_grad_(True) for group in free for one in group.values()]
        names = list(importance)
        free = Masks(
            dict(zip(names, leaves[: len(names)], strict=True)), dict(zip(names, leaves[len(names) :], strict=True))
        )
        with (
            torch.enable_grad(),
            masked(target.root, target.matrices, decomposition, drawing.between(importance, free)),
        ):
            value = target.divergence(clean, target.outputs(batch))
        if float(value.detach()) > best:
            best, found = float(value.detach()), free
        if step == steps:
            break
        slopes = iter(torch.autograd.grad(value, leaves))
        with torch.no_grad():
            free = Masks(
                *({name: (u + rate * next(slopes).sign()).clamp(0, 1) for name, u in group.items()} for group in free)
            )
    with torch.no_grad():
        return drawing.between(importance, Masks(*({name: u.detach() for name, u in group.items()} for group in found)))
