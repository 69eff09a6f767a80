"""What goes into every matrix while the model makes a reply: the activations that Wanda and ActSVD weigh weights by.

Positions are those that predict a reply's tokens, the prompt's last one among them: what decides the first word of a
reply is done there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae.lm.matrices import Matrix
from sae.weights.objective import Passage


def owners(root: nn.Module, matrices: Sequence[Matrix]) -> Iterator[tuple[nn.Module, Matrix]]:
    """Yield the module that multiplies by each matrix, inside any wrapper, with its matrix."""
    wanted = {id(matrix.parameter): matrix for matrix in matrices}
    for module in root.modules():
        own = wanted.get(id(module._parameters.get("weight")))
        if own is not None and not hasattr(module, "original_component"):
            yield module, own


@contextlib.contextmanager
def _watched(lm: Any, matrices: Sequence[Matrix], see: Callable[[Matrix, Tensor], None]) -> Iterator[None]:
    """Context in which every matrix's input [batch pos d_in] is seen, with the bridge's wrappers or without."""
    handles = []
    try:
        for module, own in owners(lm.bridge.original_model, matrices):

            def look(_: nn.Module, given: Any, matrix: Matrix = own) -> None:
                see(matrix, given[0].detach())

            handles.append(module.register_forward_pre_hook(look))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def for_inputs(
    lm: Any,
    passage: Passage,
    matrices: Sequence[Matrix],
    see: Callable[[Matrix, Tensor], None],
    batch_prompts: int = 64,
) -> int:
    """Run the passage once, and show every matrix's input where a token of it is predicted.

    Args:
        lm: the model, as it is.
        passage: what to run.
        matrices: whose inputs.
        see: called with a matrix and its inputs [token d_in] in float32, once a batch.
        batch_prompts: rows run at once.

    Returns:
        The number of tokens.
    """
    count = 0
    for start in range(0, len(passage.n_predicted), batch_prompts):
        rows = list(range(start, min(start + batch_prompts, len(passage.n_predicted))))
        batch = passage.tokens.select(rows)
        where = passage.where(rows, batch.tokens.shape[1])
        count += int(where.sum())

        def look(matrix: Matrix, x: Tensor, where: Tensor = where) -> None:
            # Some models flatten the tokens of a batch before their MLP.
            see(matrix, x.reshape(*where.shape, -1)[where.to(x.device)].float())

        with _watched(lm, matrices, look), lm.light():
            lm.forward(batch)
    return count


def input_norms(lm: Any, passage: Passage, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    """Return the norm of each input coordinate over the predicted tokens, by matrix name [d_in]."""
    squares: dict[str, Tensor] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        squares[matrix.name] = squares.get(matrix.name, 0) + x.square().sum(dim=0)

    for_inputs(lm, passage, matrices, see)
    return {name: total.sqrt() for name, total in squares.items()}


def gathered_inputs(
    lm: Any, passage: Passage, matrices: Sequence[Matrix], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Return the inputs of each matrix [token d_in] at the first `max_tokens` predicted tokens (None: all)."""
    found: dict[str, Tensor] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        before = found.get(matrix.name)
        found[matrix.name] = (x if before is None else torch.cat([before, x]))[:max_tokens]

    for_inputs(lm, passage, matrices, see)
    return found
