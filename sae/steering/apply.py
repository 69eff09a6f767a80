"""Put interventions into a language model while it reads or generates, and take them out again.

    with steer(lm, Clamp(encoder, latent=17, value=8.0, roles={Role.ASSISTANT})):
        lm.generate(batch, max_new_tokens=32)

Works with the KV cache: each forward call edits the tokens of that call, so prompt tokens are edited once and every
new token as it comes, the same as one uncached pass over the whole text.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError
from sae.lm.hooks import Edit, Step, edit
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


def _by_hook(interventions: Sequence[Intervention]) -> dict[str, Edit]:
    """Return one edit a hook point: its interventions, in order."""
    found: dict[str, list[Intervention]] = {}
    for item in interventions:
        found.setdefault(item.hook, []).append(item)
    return {hook: _composed(items) for hook, items in found.items()}


def _composed(items: Sequence[Intervention]) -> Edit:
    def apply_all(acts: Float[Tensor, "batch pos d"], step: Step | None) -> Float[Tensor, "batch pos d"]:
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
    with edit(lm, _by_hook(interventions)):
        yield


@contextlib.contextmanager
def steer_groups(
    lm: Any, groups: Sequence[Sequence[Intervention]], rows_per_group: int, force: bool = False
) -> Iterator[None]:
    """Apply other interventions to each group of rows, so that one forward or generation measures them all.

        with steer_groups(lm, [[Ablate(encoder, 3)], [Ablate(encoder, 5)]], rows_per_group=len(batch.tokens)):
            lm.generate(batch.repeat(2), max_new_tokens=32)

    The first `rows_per_group` rows of a batch are the first group, and so on; a batch with fewer rows has none of the
    last groups'. A group's rows get what `steer` with its interventions alone would give them, and a callable scope
    sees its group's rows only.

    Args:
        lm: the language model.
        groups: what to do in each group; nothing, for an empty one.
        rows_per_group: rows of the batch in each group.
        force: accept SAEs trained on another model.

    Raises:
        UserError: see `check`; inside the block, a batch of more rows than the groups have.
    """
    if rows_per_group < 1:
        raise UserError(f"rows_per_group={rows_per_group} is not positive: give 1 or more.")
    check(lm, [item for items in groups for item in items], force)
    edits = [_by_hook(items) for items in groups]
    hooks = dict.fromkeys(hook for found in edits for hook in found)
    with edit(lm, {hook: _grouped([found.get(hook) for found in edits], rows_per_group) for hook in hooks}):
        yield


def _grouped(edits: Sequence[Edit | None], rows_per_group: int) -> Edit:
    """Return the edit that gives each group of rows to its own; None leaves a group as it is."""

    def apply_each(acts: Float[Tensor, "batch pos d"], step: Step | None) -> Float[Tensor, "batch pos d"]:
        if step is None:
            raise UserError(
                "interventions by group need to know the rows: run the model through lm.logits, lm.activations or "
                "lm.generate, not through its bridge."
            )
        # Rows are in ascending order and some may have ended, so a group is a run of rows of any length.
        sizes = torch.bincount(step.rows // rows_per_group, minlength=len(edits)).tolist()
        if len(sizes) > len(edits):
            raise UserError(
                f"a batch has more rows than {len(edits)} groups of {rows_per_group}: repeat it once a group, no more."
            )
        parts = []
        for group, (part, own) in enumerate(zip(acts.split(sizes), _split(step, sizes), strict=True)):
            fn = edits[group]
            own = own._replace(rows=own.rows - group * rows_per_group)
            parts.append(part if fn is None or not len(part) else fn(part, own))
        return torch.cat(parts)

    return apply_each


def _split(step: Step, sizes: Sequence[int]) -> Iterator[Step]:
    """Yield the steps of consecutive runs of rows."""
    for fields in zip(*(field.split(sizes) for field in step[1:]), strict=True):
        yield Step(step.offset, *fields)
