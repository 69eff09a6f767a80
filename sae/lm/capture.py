"""Capturing without the bridge's wrappers: places in the Hugging Face model that see what a hook point sees.

Which places those are is tested on each model once, by values; so is whether fused attention gives the model's logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.lm import bypass, hooks

#: Rows at least this long are run with fused attention on the CPU; below, plain matrix products are faster.
FUSED_FROM = 512

#: Runs two short rows of the given length through the model, with edits at rest; returns logits.
Probe = Callable[..., Tensor]


class Site(NamedTuple):
    """A place in the Hugging Face model that sees the same values as a hook point."""

    module: torch.nn.Module
    output: bool  #: the module's output, else its first input


def tap(site: Site, keep: Callable[[Tensor], Any]) -> Any:
    """Have `keep` called with the values at a site; return the handle that ends it."""

    def first(values: Any) -> None:
        values = values[0] if isinstance(values, tuple) and values else values
        if isinstance(values, Tensor):
            keep(values)

    if site.output:
        return site.module.register_forward_hook(lambda module, args, output: first(output))
    return site.module.register_forward_pre_hook(
        lambda module, args, kwargs: first(args or kwargs.get("hidden_states")), with_kwargs=True
    )


def find_sites(bridge: Any, sections: list[bypass.Section], probe: Probe, tolerance: float) -> dict[int, Site]:
    """Hook points (by id) whose values can be had without any of the bridge's wrappers, by two tests.

    With the wrappers, a point sees the very values that the part it wraps takes or gives; without them, that part
    is still run, and its values are the same but for rounding. Looked up while nothing is hooked.
    """
    sites: dict[int, Site] = {}
    for wrapper in {id(w): w for section in sections for w in section.wrappers}.values():
        original = getattr(wrapper, "original_component", None)
        for point, output in ((wrapper.hook_in, False), (wrapper.hook_out, True)):
            if original is not None:
                sites.setdefault(id(point), Site(original, output))
    points = {id(point): point for point in bridge.hook_dict.values() if id(point) in sites}
    seen: dict[int, Tensor] = {}

    def record(acts: Any, *, hook: Any) -> None:
        if isinstance(acts, Tensor) and acts.ndim >= 3:
            seen[id(hook)] = acts

    removers = [hooks.install(point, record) for point in points.values()]
    try:
        wrapped = _watch({key: sites[key] for key in points}, probe)
    finally:
        for remove in removers:
            remove()
    with bypass.bypass(sections):
        bare = _watch({key: sites[key] for key in wrapped}, probe)

    def same(key: int) -> bool:
        known = wrapped[key]
        if key not in bare or bare[key].shape != known.shape or not torch.equal(seen[key].flatten(2), known):
            return False
        scale = known.float().abs().max().clamp_min(1.0)
        return bool((bare[key].float() - known.float()).abs().max() <= tolerance * scale)

    return {key: sites[key] for key in wrapped if key in seen and same(key)}


def _watch(sites: Mapping[int, Site], probe: Probe) -> dict[int, Tensor]:
    """The values at some sites in one probing forward."""
    found: dict[int, Tensor] = {}
    handles = [tap(site, partial(found.setdefault, key)) for key, site in sites.items()]
    try:
        probe()
    finally:
        for handle in handles:
            handle.remove()
    return {key: acts.flatten(2) for key, acts in found.items() if acts.is_floating_point() and acts.ndim >= 3}


def untouched(bridge: Any, sections: list[bypass.Section]) -> bool:
    """True when no hook of any kind is installed anywhere."""
    points = bridge.hook_dict.values()
    return all(section.idle() for section in sections) and not any(
        point._forward_hooks or point._backward_hooks for point in points
    )


def is_fusable(model: Any, sections: list[bypass.Section], probe: Probe, tolerance: float, ctx_len: int) -> bool:
    """Whether fused attention gives this model's logits; it knows no cap on attention scores, for one."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if getattr(text, "attn_logit_softcapping", None) or not getattr(model, "_supports_sdpa", False):
        return False
    with bypass.bypass(sections):
        length = min(64, ctx_len)
        plain = probe(length).float()
        with fused_attention(model):
            fused = probe(length).float()
    return bool((plain - fused).abs().max() <= tolerance * plain.abs().max().clamp_min(1.0))


@contextmanager
def fused_attention(model: Any) -> Iterator[None]:
    """Context in which a Hugging Face model's attention is torch's fused one."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before
