"""A number to explain as a differentiable function of the weights: a behaviour's margin, or the cost of replies.

    objective = margin_objective(lm, records, block_matrices(lm))
    objective.gradients(lambda matrix, gradient: ...)   # of the mean over the prompts

Only the matrices asked for get gradients, and each gradient is handed over and let go as soon as backpropagation has
made it: a backward needs the model, its activations and one matrix; a caller that adds gradients up, one more model.
What a backward keeps of activations is counted on one prompt, and prompts are run in as many batches as keep it small
beside the model.

Cost is counted in *evaluations*: one forward over all prompts is 1, and a forward with its backward 3, since a backward
makes two products where a forward makes one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.behavior.contrast import ContrastRecord
from sae.behavior.cost import Followed
from sae.behavior.measure import margin_of, prepare_margins
from sae.device import trim_memory
from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.lm.tokens import TokenBatch, pad

Array = np.ndarray
Read = Callable[[Tensor, Sequence[int]], Tensor]
"""Values [row] read off logits [row pos d_vocab], given which prompts the rows are."""
Receive = Callable[[Matrix, Tensor], None]

FORWARD, BACKWARD = 1, 2  # evaluations
ACTIVATIONS = 0.2  # of the matrices' bytes: what activations may take in a backward, if prompts can be run apart
SMALL = 64 * 2**20  # bytes that they may always take
ATTENTION_KINDS = ("q", "k", "v", "qkv", "o")  # every token passes them; an expert may see none


class Passage(NamedTuple):
    """Rows of tokens whose last ones are predicted: replies after prompts, or plain text."""

    tokens: TokenBatch  #: left-padded
    n_predicted: tuple[int, ...]  #: of each row, counted from its end

    def where(self, rows: Sequence[int], width: int) -> Tensor:
        """Positions that predict: booleans [row width] in rows whose last column is a token."""
        column = torch.arange(width)[None]
        counts = torch.tensor([self.n_predicted[row] for row in rows])[:, None]
        return (column >= width - 1 - counts) & (column < width - 1)


def passage_of(replies: Sequence[Followed], pad_id: int) -> Passage:
    """Return the model's own continuations, as `sae.behavior.cost.own_replies` made them, in one batch."""
    rows = [row for part in replies for row in part.batch.rows()]
    counts = [int(count) for part in replies for count in part.where.sum(dim=1)]
    return Passage(pad(rows, padding_side="left", pad_id=pad_id), tuple(counts))


def text_passage(batches: Sequence[TokenBatch], pad_id: int) -> Passage:
    """Return plain text, of which every token but a row's first is predicted."""
    rows = [row for batch in batches for row in batch.rows() if len(row.tokens) > 1]
    return Passage(pad(rows, padding_side="left", pad_id=pad_id), tuple(len(row.tokens) - 1 for row in rows))


class Objective:
    """The mean over prompts of a value read off the logits, as a function of some matrices.

    Attributes:
        lm: the model.
        matrices: what gradients are taken for.
        tokens: the prompts, left-padded.
        batch_prompts: rows run at once, at most.
        evaluations: forwards over all prompts so far; a forward with its backward counts 3.
    """

    def __init__(
        self, lm: Any, matrices: Sequence[Matrix], tokens: TokenBatch, read: Read, batch_prompts: int = 64
    ) -> None:
        self.lm, self.matrices, self.tokens, self.read = lm, list(matrices), tokens, read
        self.batch_prompts = batch_prompts
        self.evaluations = 0

    def __len__(self) -> int:
        return len(self.tokens.tokens)

    def _parts(self, size: int) -> Iterator[list[int]]:
        for start in range(0, len(self), size):
            yield list(range(start, min(start + size, len(self))))

    def _values(self, rows: list[int]) -> Tensor:
        return self.read(self.lm.forward(self.tokens.select(rows)), rows)

    def values(self) -> Float[Array, " n"]:
        """Return every prompt's value under the weights as they are; 1 evaluation."""
        with torch.no_grad(), self.lm.light():
            found = [self._values(rows) for rows in self._parts(self.batch_prompts)]
        self.evaluations += FORWARD
        return torch.cat(found).double().cpu().numpy()

    def gradients(self, receive: Receive) -> Float[Array, " n"]:
        """Hand over the gradient of the mean, a batch and a matrix at a time; 3 evaluations.

        Args:
            receive: called with a matrix and a share of its gradient, of the matrix's shape and type; the shares of
                all batches add up to the gradient.

        Returns:
            Every prompt's value.

        Raises:
            UserError: no gradient reaches one of the attention's matrices.
        """
        found = [self._backward(rows, receive) for rows in self._parts(self._batch)]
        self.evaluations += FORWARD + BACKWARD
        return torch.cat(found).double().cpu().numpy()

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the mean by matrix name, in float32: as large as the matrices; 3 evaluations."""
        found = {one.name: torch.zeros_like(one.parameter, dtype=torch.float32) for one in self.matrices}

        def add(matrix: Matrix, share: Tensor) -> None:
            found[matrix.name].add_(share)

        self.gradients(add)
        return found

    def prompt_gradients(self, receive: Callable[[Matrix, Tensor, int], None]) -> None:
        """Hand over the gradient of every prompt's own value, a prompt and a matrix at a time; 3 evaluations."""
        for (row,) in self._parts(1):
            self._backward(
                [row],
                lambda matrix, gradient, row=row: receive(matrix, gradient * len(self), row),  # type: ignore[misc]
            )
        self.evaluations += FORWARD + BACKWARD

    @functools.cached_property
    def _batch(self) -> int:
        """Rows whose activations a backward may keep together; counting it takes a forward of one row."""
        sizes = [one.parameter.numel() * one.parameter.element_size() for one in self.matrices]
        allowed = max(SMALL, int(ACTIVATIONS * sum(sizes)))
        longest = int(self.tokens.mask.sum(dim=1).argmax())
        return min(self.batch_prompts, max(1, allowed // max(1, self._activations(longest))))

    def _activations(self, row: int) -> int:
        """Bytes that a row's forward keeps for its backward, beside what is in the model anyway."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an operation's own result would keep itself alive

        counted = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with _differentiated(self.lm, self.matrices, _drop), torch.enable_grad(), self.lm.light(), counted:
            self._values([row])
        model = self.lm.bridge.original_model
        for own in (*model.parameters(), *model.buffers()):
            kept.pop(own.untyped_storage().data_ptr(), None)
        return sum(kept.values())

    def _backward(self, rows: list[int], receive: Receive) -> Tensor:
        reached: set[str] = set()

        def hand_over(matrix: Matrix, gradient: Tensor) -> None:
            reached.add(matrix.name)
            receive(matrix, gradient)

        with _differentiated(self.lm, self.matrices, hand_over), torch.enable_grad(), self.lm.light():
            values = self._values(rows)
            (values.sum() / len(self)).backward()
        trim_memory()
        for matrix in self.matrices:
            if matrix.kind in ATTENTION_KINDS and matrix.name not in reached:
                raise UserError(
                    f"no gradient reaches {matrix.name!r} of {self.lm.name!r}: load the model with "
                    "lm.library=transformers, whose modules compute with the very matrices."
                )
        return values.detach()


def _drop(matrix: Matrix, gradient: Tensor) -> None:
    """Let a gradient go."""


@contextlib.contextmanager
def _differentiated(lm: Any, matrices: Sequence[Matrix], receive: Receive) -> Iterator[None]:
    """Context in which just these matrices take gradients, each of which goes to `receive` and nowhere else."""
    everything = list(lm.bridge.original_model.parameters())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
    handles = []
    try:
        for parameter in everything:
            parameter.requires_grad_(False)
            parameter.grad = None
        for matrix in matrices:

            def passed(parameter: Tensor, matrix: Matrix = matrix) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                receive(matrix, gradient)

            matrix.parameter.requires_grad_(True)
            handles.append(matrix.parameter.register_post_accumulate_grad_hook(passed))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def margin_objective(
    lm: Any, records: Sequence[ContrastRecord], matrices: Sequence[Matrix], batch_prompts: int = 64
) -> Objective:
    """Return a behaviour's logit margin (see `sae.behavior.measure.margins`) on records as an objective.

    Raises:
        UserError: no records, or one whose texts cannot be told apart by one token.
    """
    if not records:
        raise UserError("there are no prompts to take a margin on: add records where the behaviour is due.")
    task = prepare_margins(lm, records, batch_prompts=len(records))
    (tokens,) = task.batches

    def read(logits: Tensor, rows: Sequence[int]) -> Tensor:
        last = logits[:, -1].float().cpu()  # left-padded: the next token is predicted in the last column
        behavior, alternative = task.behavior_ids, task.alternative_ids
        return margin_of(last, [behavior[row] for row in rows], [alternative[row] for row in rows])

    return Objective(lm, matrices, tokens, read, batch_prompts)


def reply_objective(lm: Any, passage: Passage, matrices: Sequence[Matrix], batch_prompts: int = 64) -> Objective:
    """Return the mean cross entropy (nats a token) of each row's predicted tokens as an objective.

    Of the model's own replies this is the utility that a behaviour's attribution is compared with: what they need is
    needed where the behaviour is not due.
    """

    def read(logits: Tensor, rows: Sequence[int]) -> Tensor:
        tokens = passage.tokens.select(rows).tokens.to(logits.device)
        where = passage.where(rows, tokens.shape[1]).to(logits.device)
        targets = tokens.roll(-1, dims=1)[..., None]
        logprobs = logits.float().log_softmax(dim=-1).gather(2, targets).squeeze(2)
        return -(logprobs * where).sum(dim=1) / where.sum(dim=1)

    return Objective(lm, matrices, passage.tokens, read, batch_prompts)
