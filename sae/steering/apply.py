"""Put interventions into a language model while it reads or generates, and take them out again.

    with steer(lm, Clamp(encoder, latent=17, value=8.0, roles={Role.ASSISTANT})):
        lm.generate(batch, max_new_tokens=32)

Works with the KV cache: each forward call edits the tokens of that call, so prompt tokens are edited once and every
new token as it comes, the same as one uncached pass over the whole text.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from sae.errors import UserError
from sae.lm.hooks import Step, edit
from sae.steering.interventions import Intervention


def check(lm: Any, interventions: Sequence[Intervention], force: bool = False) -> None:
    """Check that interventions fit the model.

    Raises:
        UserError: an unknown hook point, a width that differs, or an SAE trained on another model's activations
            (`force` allows the last).
    """
    for item in interventions:
        if not isinstance(item, Intervention):
            raise UserError(f"{type(item).__name__} is not an intervention: use Clamp, Ablate, Add or ProjectOut.")
        lm.check_hook(item.hook)
        width = lm.d_in(item.hook)
        if item.d_in != width:
            raise UserError(
                f"{type(item).__name__} has d_in={item.d_in}, but {item.hook!r} of {lm.name!r} is {width} wide: "
                "use an SAE or direction computed there."
            )
        if item.encoder_used is None or force:
            continue
        trained_on = getattr(item.encoder_used.config, "lm_fingerprint", None)
        # Foreign formats carry no fingerprint; then the width is all that can be checked.
        if trained_on and trained_on != lm.fingerprint:
            name = getattr(item.encoder_used.config, "lm_name", "") or "another model"
            raise UserError(
                f"this SAE was trained on {name!r} (fingerprint {trained_on[:12]}), not on {lm.name!r} "
                f"({lm.fingerprint[:12]}): its latents mean nothing there; force=True overrides."
            )


def _composed(items: Sequence[Intervention]) -> Callable[[Tensor, Step | None], Tensor]:
    def apply_all(acts: Tensor, step: Step | None) -> Tensor:
        for item in items:
            acts = item.apply_to(acts, step)
        return acts

    return apply_all


@contextlib.contextmanager
def steer(lm: Any, *interventions: Intervention, force: bool = False) -> Iterator[None]:
    """Apply interventions to every forward call and generation of `lm` inside the block.

    Interventions at one hook point act in the order given, each on the result of the one before; an SAE then encodes
    the already edited activations. Blocks may be nested: the outer block's edits come first. The hooks are removed
    when the block ends, whatever happens in it. With no interventions the model is left as it is.

    Args:
        lm: the language model.
        interventions: what to do.
        force: accept SAEs trained on another model.

    Raises:
        UserError: see `check`.
    """
    check(lm, interventions, force)
    by_hook: dict[str, list[Intervention]] = {}
    for item in interventions:
        by_hook.setdefault(item.hook, []).append(item)
    if not by_hook:
        yield
        return
    with edit(lm, {hook: _composed(items) for hook, items in by_hook.items()}):
        yield
