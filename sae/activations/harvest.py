r"""From documents to activations: tokens split into training and held-out rows, and forward passes over them.

documents -> prepare() -> Corpus(train, held_out) -> Passes -> harvest() -> store
                                                          \-> LiveStream
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activations.behind import Behind
from sae.activations.store import Shard, StoreInfo, StoreWriter, TokenRows, check_disk, disk_bytes
from sae.errors import UserError
from sae.files import atomic_folder, read_tensors, write_tensors
from sae.lm.documents import Document
from sae.lm.model import LanguageModel
from sae.lm.tokens import PackedTokens, Role, TokenBatch, Tokenized, pack, sae_mask

# One document in HELD_OUT_EVERY goes to the held-out side until that has enough tokens.
HELD_OUT_EVERY = 10


class Corpus(NamedTuple):
    """Tokenised text; no document, nor a copy of one, is on both sides."""

    train: PackedTokens
    held_out: PackedTokens


def prepare(
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    ctx_len: int,
    packing: str,
    n_tokens: int,
    n_held_out_tokens: int,
) -> Corpus:
    """Tokenise documents and split them into training and held-out rows.

    The side is chosen by a hash of the document's content, so that copies of one text are never on both sides and
    the split is the same whatever else is read. Reading stops when both sides are full.

    Args:
        lm: the language model, for its tokenizer.
        documents: texts or chats.
        ctx_len: tokens in a row.
        packing: ``"concat"``, ``"document"``, or ``"auto"``: document for chats, concat for running text.
        n_tokens: tokens wanted for training; the last text is cut to fit.
        n_held_out_tokens: tokens wanted for evaluation, likewise.

    Raises:
        UserError: the documents give no training or no held-out tokens.
    """
    sides = {False: _Side(n_tokens), True: _Side(n_held_out_tokens)}
    seen_chat, n_read = False, 0
    asked, answered = tee(_needed(documents, sides))
    for document, tokenized in zip(answered, lm.tokenize_documents(asked), strict=True):
        seen_chat = seen_chat or document.messages is not None
        n_read += 1
        a_row_each = packing == "document" or (packing == "auto" and seen_chat)
        sides[is_held_out(document)].add(tokenized, ctx_len if a_row_each else None)
    if not sides[False].texts:
        raise UserError("the text gives no training tokens: check data.path, data.text_field and data.n_tokens.")
    if not sides[True].texts:
        raise UserError(
            f"the text is too short to hold any of it out ({n_read} documents): give more documents; "
            "separate texts in a .txt file by a line <|endoftext|> or use JSON lines."
        )
    mode = ("document" if seen_chat else "concat") if packing == "auto" else packing
    return Corpus(*(pack(sides[side].tokenized(), ctx_len, mode, lead_id=lm.lead_id) for side in (False, True)))


class _Side:
    """The texts of one side of the split, in compact arrays (Python ints would take ten times the memory)."""

    def __init__(self, wanted: int) -> None:
        self.missing = wanted
        self.texts: list[tuple[array, array]] = []

    def add(self, text: Tokenized, longest: int | None) -> None:
        """Keep a text, cut to `longest` tokens and to what is still missing."""
        length = min(len(text.tokens), self.missing, longest or len(text.tokens))
        if length > 0:
            self.texts.append((array("i", text.tokens[:length]), array("B", text.roles[:length])))
            self.missing -= length

    def tokenized(self) -> Iterator[Tokenized]:
        """The texts, as they were added."""
        for tokens, roles in self.texts:
            yield Tokenized(tokens.tolist(), roles.tolist())


def is_held_out(document: Document) -> bool:
    """Tell which side a document is on, from its content alone."""
    content = document.text if document.messages is None else json.dumps(document.messages, sort_keys=True)
    return int(hashlib.sha256(str(content).encode()).hexdigest()[:12], 16) % HELD_OUT_EVERY == 0


def _needed(documents: Iterable[Document], sides: dict[bool, _Side]) -> Iterator[Document]:
    for document in documents:
        if all(side.missing <= 0 for side in sides.values()):
            return
        if sides[is_held_out(document)].missing > 0:
            yield document


def save_corpus(folder: Path, corpus: Corpus) -> None:
    """Write both sides as safetensors, together or not at all."""
    with atomic_folder(folder) as temporary:
        for name, packed in corpus._asdict().items():
            write_tensors(temporary / f"{name}.safetensors", packed._asdict())


def load_corpus(folder: Path) -> Corpus:
    """Read what `save_corpus` wrote."""
    return Corpus(*(PackedTokens(**read_tensors(folder / f"{name}.safetensors")) for name in Corpus._fields))


class Passes:
    """The forward passes over packed rows: pass number -> activations of its tokens.

    Rows are sorted by length, and a pass holds as many as fit into `batch_tokens` with padding counted, so little
    is padded. The order does not matter to what is learned: the store and the live stream shuffle tokens.

    Args:
        lm: the language model.
        packed: rows of tokens.
        hook_names: where to capture.
        batch_tokens: tokens in one pass, padding included.
        include_special: keep BOS, EOS and other special tokens.
    """

    def __init__(
        self,
        lm: LanguageModel,
        packed: PackedTokens,
        hook_names: list[str],
        *,
        batch_tokens: int,
        include_special: bool = False,
    ) -> None:
        for name in hook_names:
            lm.check_hook(name)
        self.lm = lm
        self.packed = packed
        self.hook_names = hook_names
        self.include_special = include_special
        self.d_in = {name: lm.d_in(name) for name in hook_names}
        self.n_tokens = int(sae_mask(packed.roles, include_special).sum())
        lengths = (packed.roles != Role.PAD).sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        self._rows: list[Tensor] = []
        start = 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            n_rows = max(1, batch_tokens // longest)
            self._rows.append(order[start : start + n_rows])
            start += n_rows
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, number: int) -> Shard:
        """Run pass `number` and return the rows of the tokens an SAE may see, in reading order."""
        rows = self._rows[number]
        longest = int(self._lengths[rows].max())
        tokens = self.packed.tokens[rows, :longest].long()
        roles = self.packed.roles[rows, :longest]
        acts = self.lm.activations(TokenBatch(tokens, roles != Role.PAD, roles), self.hook_names)
        keep = sae_mask(roles, self.include_special)
        positions = torch.arange(longest, dtype=torch.int32).expand(len(rows), longest)
        fields = TokenRows(
            tokens[keep].int(), roles[keep], self.packed.doc[rows, :longest][keep].int(), positions[keep]
        )
        return Shard({name: block[keep.to(block.device)] for name, block in acts.items()}, fields)


def harvest(
    passes: Passes,
    folder: Path,
    *,
    shard_tokens: int,
    dtype: str,
    seed: int,
    identity: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> StoreInfo:
    """Run every pass and write the store; a harvest that was killed goes on where it was.

    A background thread converts, groups and writes what a pass gave while the model makes the next one.

    Args:
        passes: the forward passes.
        folder: where the store goes.
        shard_tokens: mean tokens in a shard.
        dtype: storage type.
        seed: of the permutation.
        identity: hash of all that decides what the passes give; a killed harvest only goes on under the same.
        progress: called with (tokens done, tokens in all).

    Raises:
        UserError: the disk is too small, or an activation is not finite.
    """
    check_disk(folder, disk_bytes(passes.d_in, passes.n_tokens, shard_tokens, dtype))
    writer = StoreWriter(
        folder,
        passes.d_in,
        n_tokens=passes.n_tokens,
        shard_tokens=shard_tokens,
        dtype=dtype,
        seed=seed,
        lm_name=passes.lm.name,
        lm_fingerprint=passes.lm.fingerprint,
        identity=identity,
    )
    done = passes.n_tokens * writer.next_pass // max(1, len(passes))
    with Behind() as behind:
        for number in range(writer.next_pass, len(passes)):
            shard = passes(number)
            behind.submit(partial(writer.add, shard.acts, shard.tokens))
            done += shard.tokens.token.shape[0]
            if progress is not None:
                progress(min(done, passes.n_tokens), passes.n_tokens)
    return writer.finish()
