"""Where a head's queries, keys and values lie in a matrix that makes those of all heads at once.

Architectures order the rows of such a matrix differently, and shapes do not tell how: GPT-2 has all queries, then all
keys, then all values; GPT-NeoX the three of one head, then those of the next; CodeGen four parts, each with queries,
then *values*, then keys of a quarter of the heads. So the order is known by the names of architecture and matrix, and
where it is not, nothing is said. `tests/unit/lm/test_lm_head_layout.py` checks every one of them against the model.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Heads(NamedTuple):
    """How many heads, how many of keys and values, and how long each is."""

    n_heads: int
    n_shared: int  #: heads of keys and values: fewer where several heads of queries share them
    size: int


Order = Callable[[Heads, int], tuple[int, ...]]
"""The places of a head's queries and, where no other head shares them, its keys and values, in units of a head."""


def _consecutive(heads: Heads, index: int) -> tuple[int, ...]:
    """All queries, then all keys, then all values."""
    n, shared, _ = heads
    return (index, n + index, n + shared + index) if shared == n else (index,)


def _grouped(heads: Heads, index: int) -> tuple[int, ...]:
    """Groups of some queries with the key and the value that they share; of one head each, by head."""
    each = heads.n_heads // heads.n_shared
    group, place = divmod(index, each)
    start = group * (each + 2)
    return (start, start + 1, start + 2) if each == 1 else (start + place,)


CODEGEN_PARTS = 4


def _codegen(heads: Heads, index: int) -> tuple[int, ...]:
    """Four parts, once on four accelerators: in each, queries, values and keys of a quarter of the heads."""
    each = heads.n_heads // CODEGEN_PARTS
    part, place = divmod(index, each)
    start = part * 3 * each + place
    return (start, start + 2 * each, start + each)


def _of_falcon(config: Any, heads: Heads) -> tuple[Order, Heads]:
    if getattr(config, "new_decoder_architecture", False):
        return _grouped, heads._replace(n_shared=int(config.num_kv_heads))
    return _grouped, heads._replace(n_shared=1 if getattr(config, "multi_query", True) else heads.n_heads)


def _of_bigcode(config: Any, heads: Heads) -> tuple[Order, Heads]:
    if getattr(config, "multi_query", True):
        return _consecutive, heads._replace(n_shared=1)
    return _grouped, heads._replace(n_shared=heads.n_heads)


def _always(order: Order) -> Callable[[Any, Heads], tuple[Order, Heads]]:
    return lambda config, heads: (order, heads)


ORDERS: Mapping[tuple[str, str], Callable[[Any, Heads], tuple[Order, Heads]]] = {
    ("gpt2", "c_attn"): _always(_consecutive),
    ("openai-gpt", "c_attn"): _always(_consecutive),
    ("phi3", "qkv_proj"): _always(_consecutive),
    ("mpt", "Wqkv"): _always(_consecutive),
    ("gpt_neox", "query_key_value"): _always(_grouped),
    ("gpt_neox_japanese", "query_key_value"): _always(_grouped),
    ("bloom", "query_key_value"): _always(_grouped),
    ("persimmon", "query_key_value"): _always(_grouped),
    ("falcon", "query_key_value"): _of_falcon,
    ("gpt_bigcode", "c_attn"): _of_bigcode,
    ("codegen", "qkv_proj"): _always(_codegen),
}
"""By the architecture's `model_type` and the name of its module."""


def fused_starts(config: Any, module: str, heads: Heads, index: int, length: int) -> tuple[int, ...] | None:
    """Return the rows at which a head's queries, and its own keys and values, begin; each has `heads.size` rows.

    Args:
        config: the Hugging Face model's.
        module: name of the module that holds the matrix, such as ``"c_attn"``.
        heads: of the model; `n_shared` counts only where `config` does not say it.
        index: which head.
        length: rows of the matrix.

    Returns:
        None where the order is not known, or the matrix is not as long as it would have to be.
    """
    known = ORDERS.get((str(getattr(config, "model_type", "")), module))
    if known is None:
        return None
    order, heads = known(config, heads)
    n, shared, size = heads
    if n % shared or length != size * (n + 2 * shared) or (order is _codegen and n % CODEGEN_PARTS):
        return None
    return tuple(place * size for place in order(heads, index))
