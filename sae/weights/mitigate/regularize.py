"""Fine-tuning to the alternative replies, held close to the original weights.

The loss has a further term, strength / 2 * sum F (w - w0)^2 / sum F w0^2: `strength` is twice the nats that a change as
large as the weights themselves costs, whatever the model's size. F is 1 (`l2`), or the Fisher information of the
model's own replies to harmless prompts (elastic weight consolidation, Kirkpatrick et al. 1612.00796), so that what
those depend on moves least. F is a mean over prompts of squared gradients, with a tenth of its overall mean added:
parameters that no prompt touched are not known to be free.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae.lm.weights import plain_parameters
from sae.weights.mitigate.choose import Weights, Work, put
from sae.weights.mitigate.finetune import check_trainable, supervised, train
from sae.weights.mitigate.replies import Replies, reply_loss

FLOOR = 0.1  # of the mean Fisher information
N_FISHER = 64  # prompts


def regularize(work: Work) -> None:
    """Train once for every strength."""
    settings = work.settings
    importance = None
    if settings.penalty == "fisher":
        importance = fisher(work.lm, work.case.retain, N_FISHER, work.progress)
    for strength in settings.strengths:
        put(work.lm, work.before)
        dose = {"penalty": settings.penalty, "strength": strength}
        train(work, supervised(work), dose, pull=penalty(work.lm, work.before, importance, strength))


def penalty(lm: Any, before: Weights, importance: Weights | None, strength: float) -> Callable[[], None]:
    """What adds the penalty's gradient to the parameters' own.

    Args:
        lm: the model.
        before: the original weights.
        importance: F by parameter, None for 1.
        strength: see the head of this file.
    """
    own = plain_parameters(lm)
    size = sum(
        float((values.double().square() * (1.0 if importance is None else importance[name].double())).sum())
        for name, values in before.items()
    )

    @torch.no_grad()
    def pull() -> None:
        for name, parameter in own.items():
            moved = parameter - before[name].to(parameter.device)
            if importance is not None:
                moved = moved * importance[name].to(parameter.device)
            gradient = moved * (strength / size)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    return pull


def fisher(lm: Any, kept: Replies, n: int, progress: Callable[[str, int, int], None]) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of replies, of mean 1 over all parameters, with a floor.

    Args:
        lm: the model.
        kept: chats with replies.
        n: how many of them, at most; each takes a backward pass.
        progress: called after each.
    """
    check_trainable(lm)
    own = plain_parameters(lm)  # embeddings and norms among them, so that no `Objective` of matrices will do
    for parameter in own.values():
        parameter.requires_grad_(True)
    found = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    n = min(n, len(kept.rows))
    for row in range(n):
        with torch.enable_grad(), lm.light():
            reply_loss(lm, kept.batch(lm, [row])).backward()
        for name, parameter in own.items():
            if parameter.grad is not None:
                found[name] += parameter.grad.square()
            parameter.grad = None
        progress("Fisher information", row + 1, n)
    mean = sum(float(values.double().sum()) for values in found.values()) / sum(v.numel() for v in found.values())
    scale = mean or 1.0
    return {name: values.cpu() / scale + FLOOR for name, values in found.items()}
