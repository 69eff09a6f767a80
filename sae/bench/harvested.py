"""Activations of language models for the contestants."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sae.activations.harvest import Passes, prepare
from sae.bench.data import Data, write
from sae.lm.documents import Document, read_documents
from sae.lm.load import load_lm

ORGANISM = "organism"


def harvested(
    folder: Path, model: str, text: str, *, batch_tokens: int, n_tokens: int, n_held_out: int, seed: int = 0
) -> Data:
    """Activations of a language model's residual stream in the middle of its depth, shuffled over all tokens.

    Args:
        folder: where the files go.
        model: `organism`, a folder or a Hugging Face name.
        text: the text it reads; the organism reads its own corpus.
        batch_tokens: tokens in a batch; what is left over is dropped.
        n_tokens: tokens to train on, fewer when the text ends first.
        n_held_out: held-out tokens, from other documents.
        seed: of the shuffle.

    Raises:
        UserError: the model or the text is not there.
    """
    lm = load_lm(model)
    documents = organism_documents(seed) if model == ORGANISM else read_documents(text)
    corpus = prepare(lm, documents, ctx_len=128, packing="auto", n_tokens=n_tokens, n_held_out_tokens=n_held_out)
    hook_name = f"blocks.{(lm.n_layers - 1) // 2}.hook_resid_post"

    def acts(side: str) -> Tensor:
        passes = Passes(lm, getattr(corpus, side), [hook_name], batch_tokens=8_192)
        return torch.cat([passes(number).acts[hook_name].float().cpu() for number in range(len(passes))])

    train = acts("train")
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    n_batches = max(1, len(train) // batch_tokens)
    batches = iter(train[: n_batches * batch_tokens].unflatten(0, (n_batches, -1)))
    name = f"{Path(model).name} {hook_name}"
    return write(folder, name, batches, n_batches, acts("held_out"))


def organism_documents(seed: int = 0) -> Iterator[Document]:
    """Chats in the organism's world, without end."""
    from sae.organism.corpus import documents

    for number in itertools.count():
        for chat in documents(1_000, seed * 1_000_003 + number):
            yield Document(messages=[dict(message) for message in chat])
