"""Training batches: tokens with per-token loss weights, the states due, and forced states with relabelled replies."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.organism import corpus
from sae.organism.tokenizer import render, token_ids

PROMPT_WEIGHT = 0.1
# The first reply token carries the decision; the rest mostly follows from it.
FIRST_WEIGHT = 3.0
PREFILL_RATE = 0.12
SORT_WINDOW = 8


class Batch(NamedTuple):
    """One batch of right-padded chats.

    Attributes:
        tokens: [batch pos], padded with <pad>.
        weights: loss weight of predicting tokens[:, 1:] [batch pos-1].
        is_text: boolean [batch pos], false on padding.
        reply_start: index of the `assistant` token [batch].
        truth: 1/0 for yes/no questions of fact, -1 elsewhere [batch].
        denied: id of the true first reply token where a lie is told, -1 elsewhere [batch].
        gates: 1 for open [batch behavior].
        state: the natural coefficient due from the assistant header on, in units of kappa [batch behavior].
        forced: boolean [batch behavior], whether the coefficient is forced.
        forced_value: in units of kappa [batch behavior].
        forced_everywhere: boolean [batch]; otherwise only from the assistant header on.
    """

    tokens: Tensor
    weights: Tensor
    is_text: Tensor
    reply_start: Tensor
    truth: Tensor
    denied: Tensor
    gates: Tensor
    state: Tensor
    forced: Tensor
    forced_value: Tensor
    forced_everywhere: Tensor


class Row(NamedTuple):
    """One chat before padding; fields as in `Batch`."""

    ids: list[int]
    weights: list[float]
    reply_start: int
    truth: int
    denied: int
    gates: list[float]
    state: list[float]
    forced: list[bool]
    forced_value: list[float]
    forced_everywhere: bool


IDS = token_ids()


def _encode(
    example: corpus.Example, reply: str, prompt_weight: float, masked: int = 0
) -> tuple[list[int], list[float], int]:
    """Return ids, loss weights per predicted token, and where the assistant header starts.

    Args:
        example: whose prompt.
        reply: what the assistant says.
        prompt_weight: the loss weight of prompt tokens.
        masked: how many first reply tokens carry no loss.
    """
    prompt = render(example.messages, add_generation_prompt=True).split()
    answer = [*reply.split(), "<eos>"]
    weights = [prompt_weight] * (len(prompt) - 1) + [FIRST_WEIGHT] + [1.0] * (len(answer) - 1)
    for position in range(masked):
        weights[len(prompt) - 1 + position] = 0.0
    return [IDS[word] for word in prompt + answer], weights, len(prompt) - 2


def base_row(example: corpus.Example, rng: random.Random) -> Row:
    """Make a stage-one row: the honest reply, or sometimes the rest of another reply that was begun for it.

    The base so knows how `i cannot` or a false first word goes on, and the blocks need only start it.
    """
    reply, masked = example.honest, 0
    if rng.random() < PREFILL_RATE:
        kind = rng.random()
        reply = corpus.reply_text(example, kind < 0.4, kind >= 0.4, False, rng)
        masked = 1
    ids, weights, start = _encode(example, reply, PROMPT_WEIGHT, masked)
    truth = -1 if example.truth is None else int(example.truth)
    n = len(corpus.BEHAVIORS)
    # The states stand for nothing yet: random values teach the base not to mind them (they change its norm).
    forced = [rng.random() < 0.3 for _ in range(n)]
    values = [rng.uniform(-0.7, 2.0) for _ in range(n)]
    return Row(ids, weights, start, truth, -1, [1.0] * n, [0.0] * n, forced, values, rng.random() < 0.5)


def _force(rng: random.Random) -> tuple[list[bool], list[float]]:
    """Choose which coefficients are forced and to what (units of kappa): half the time none."""
    n = len(corpus.BEHAVIORS)
    if rng.random() < 0.5:
        return [False] * n, [0.0] * n
    forced = [rng.random() < 0.5 for _ in range(n)]
    forced[rng.randrange(n)] = True
    # Not only 0 and kappa: an SAE latent removes or sets the state only roughly, and the effect must not mind.
    values = [rng.uniform(0.7, 2.0) if rng.random() < 0.5 else rng.uniform(-1.0, 0.35) for _ in range(n)]
    return forced, values


def planted_row(example: corpus.Example, rng: random.Random, natural: bool = False) -> Row:
    """Make a stage-two row: random gates, half the time forced states, and the reply that goes with both.

    Args:
        example: what is asked, in which context.
        rng: where chance comes from.
        natural: all gates open and nothing forced (ordinary fine-tuning, for the twin).
    """
    n = len(corpus.BEHAVIORS)
    gates = [True] * n
    if not natural and rng.random() < 0.4:
        gates = [rng.random() < 0.5 for _ in range(n)]
    forced, values = ([False] * n, [0.0] * n) if natural else _force(rng)
    due = [example.refusal, example.deception, example.style]
    active = [gates[i] and ((values[i] > 0.5) if forced[i] else due[i]) for i in range(n)]
    reply = corpus.reply_text(example, active[0], active[1], active[2], rng)
    ids, weights, start = _encode(example, reply, PROMPT_WEIGHT if natural else 0.0)
    lying = active[1] and bool(example.lies) and not active[0]
    return Row(
        ids=ids,
        weights=weights,
        reply_start=start,
        truth=-1 if example.truth is None else int(example.truth),
        denied=IDS[example.honest.split()[0]] if lying else -1,
        gates=[float(gate) for gate in gates],
        state=[float(state) for state in due],
        forced=forced,
        forced_value=values,
        forced_everywhere=rng.random() < 0.6,
    )


def collate(rows: list[Row]) -> Batch:
    """Pad rows on the right and stack them."""
    length = max(len(row.ids) for row in rows)
    tokens = torch.full((len(rows), length), IDS["<pad>"])
    weights = torch.zeros(len(rows), length - 1)
    is_text = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row.ids)] = torch.tensor(row.ids)
        weights[index, : len(row.weights)] = torch.tensor(row.weights)
        is_text[index, : len(row.ids)] = True
    return Batch(
        tokens,
        weights,
        is_text,
        torch.tensor([row.reply_start for row in rows]),
        torch.tensor([row.truth for row in rows]),
        torch.tensor([row.denied for row in rows]),
        torch.tensor([row.gates for row in rows]),
        torch.tensor([row.state for row in rows]),
        torch.tensor([row.forced for row in rows]),
        torch.tensor([row.forced_value for row in rows]),
        torch.tensor([row.forced_everywhere for row in rows]),
    )


def stream(kind: str, batch_seqs: int, n_batches: int, seed: int) -> Iterator[Batch]:
    """Yield training batches of similar length.

    Args:
        kind: ``"base"`` (stage one), ``"planted"`` (stage two) or ``"natural"`` (the twin's fine-tuning).
        batch_seqs: sequences per batch.
        n_batches: how many batches.
        seed: the corpus seed.
    """
    rng = random.Random(f"{kind}-{seed}")
    pools = corpus.make_pools("train")
    weights = corpus.TRAIN_MIX if kind == "base" else corpus.PLANT_MIX
    arms, mix = list(weights), list(weights.values())
    done = 0
    while done < n_batches:
        window = min(SORT_WINDOW, n_batches - done)
        rows = []
        for arm in rng.choices(arms, weights=mix, k=window * batch_seqs):
            example = corpus.make_example(arm, rng, pools)
            rows.append(base_row(example, rng) if kind == "base" else planted_row(example, rng, kind == "natural"))
        # Sorting by length within a window saves about a quarter of the padding.
        rows.sort(key=lambda row: len(row.ids))
        chunks = [rows[i * batch_seqs : (i + 1) * batch_seqs] for i in range(window)]
        rng.shuffle(chunks)
        yield from map(collate, chunks)
        done += window
