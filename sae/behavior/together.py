"""Several interventions on the same prompts at once: every prompt is run once for each, in common batches.

What lies before the interventions is run once for all of them, prompts of like length share batches, so that little
padding is computed, and one forward over many rows costs less than many over few. A row's result does not depend on its
company, so only the time changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from sae.lm.tokens import TokenBatch
from sae.steering.apply import steer_groups
from sae.steering.interventions import Intervention

T = TypeVar("T")
Groups = Sequence[Sequence[Intervention]]
"""What to do in each of several measurements; an empty one measures the model as it is."""

#: Prompts that go together, where there are interventions enough to fill a batch with: few, so that they are of like
#: length, yet enough that what each intervention adds to a forward is small beside it.
ALIKE = 16


def per_group(
    lm: Any,
    groups: Groups,
    prompts: TokenBatch,
    max_rows: int,
    read: Callable[[TokenBatch, list[int]], Sequence[T]],
) -> Iterator[list[T]]:
    """Read something off every prompt under each group of interventions.

    Args:
        lm: the model.
        groups: the interventions.
        prompts: what to read.
        max_rows: rows run at once, whatever the number of groups: memory grows with these alone. More than a few
            hundred are no faster, since the time goes into the rows by then.
        read: given rows, and which prompt each of them is, returns one value a row.

    Yields:
        one group's values after the other's, in the prompts' order. A few groups are run at a time, when asked for.
    """
    lengths = prompts.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for some in _evenly(groups, max_rows // ALIKE):
        found: list[dict[int, T]] = [{} for _ in some]
        for part in _evenly(order, max_rows // len(some)):
            batch = prompts.select(part)
            with sharing(lm, some, batch, len(some)), steer_groups(lm, some, len(part)):
                values = read(batch.repeat(len(some)), [*part] * len(some))
            for row, value in enumerate(values):
                group, index = divmod(row, len(part))
                found[group][part[index]] = value
        yield from ([values[index] for index in range(len(order))] for values in found)


def sharing(lm: Any, groups: Groups, prompts: TokenBatch, copies: int) -> AbstractContextManager[None]:
    """Context in which forwards over copies of the prompts share what none of the interventions changes."""
    if len(groups) < 2:
        return nullcontext()
    shared: AbstractContextManager[None] = lm.sharing(
        prompts, copies, sorted({item.hook for items in groups for item in items})
    )
    return shared


def _evenly(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Yield the fewest consecutive pieces of at most `most` items (at least 1), none much shorter than another."""
    n_pieces = -(-len(items) // max(1, most))
    for piece in range(n_pieces):
        yield items[len(items) * piece // n_pieces : len(items) * (piece + 1) // n_pieces]
