"""Run blocks without hooks at full speed.

TransformerLens puts a wrapper around every module of the Hugging Face model, which doubles the cost of a forward
for small models and single tokens even where nothing is hooked. `bypass` takes the wrappers out of the parts that
have no hooks, for the duration of a block, and puts them back. A wrapper with parameters of its own is only taken out
while these are views of the original's (GPT-2's split attention weights), so weight edits made through the bridge are
always seen. GPT-2's activation function, eight passes over memory, gives way to torch's fused one meanwhile.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


class Section:
    """A part of the model that keeps or loses its wrappers as a whole: a block, the embedding, the final norm..."""

    def __init__(self, parent: nn.Module, name: str, wrapper: Any) -> None:
        from transformer_lens.hook_points import HookPoint

        members = list(wrapper.modules())
        self.points = [module for module in members if isinstance(module, HookPoint)]
        # Someone may hook the wrappers themselves. Pre-hooks that are there already are the bridge's own.
        self.wrappers = [module for module in members if _is_wrapper(module)]
        self.own = {id(module): set(module._forward_pre_hooks) for module in self.wrappers}
        self.swaps = _swaps(parent, name, wrapper)
        self.views = [view for module in self.wrappers for view in _views(module)]

    def idle(self) -> bool:
        """True when no hook of any kind is installed in this part, and its wrappers' weights are the original's."""
        for holder, name, view, address in self.views:
            if holder._parameters.get(name) is not view or view.data_ptr() != address:
                return False
        return not any(point._forward_hooks or point._backward_hooks for point in self.points) and not any(
            module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or set(module._forward_pre_hooks) - self.own[id(module)]
            for module in self.wrappers
        )


def _is_wrapper(module: Any) -> bool:
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    return isinstance(module, GeneralizedComponent)


def _swaps(parent: nn.Module, name: str, wrapper: Any) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """(parent, name, wrapper, original) for this wrapper and for all those inside its original."""
    original = wrapper.original_component
    stored = {parameter.untyped_storage().data_ptr() for parameter in original.parameters()}
    own = [view for _, _, view, _ in _views(wrapper) if view.untyped_storage().data_ptr() not in stored - {0}]
    found = [] if own else [(parent, name, wrapper, original)]
    # Inside a wrapper that stays, its children are reached through the original too, so they may go.
    for child_name, child in list(original._modules.items()):
        if child is not None:
            found += _walk(original, child_name, child)
    return found


def _views(wrapper: Any) -> list[tuple[nn.Module, str, nn.Parameter, int]]:
    """(holder, name, parameter, address) of a wrapper's parameters that are not the original's own objects."""
    original = getattr(wrapper, "original_component", None)
    if original is None:
        return []
    known = {id(parameter) for parameter in original.parameters()}
    return [
        (holder, name, parameter, parameter.data_ptr())
        for holder in wrapper.modules()
        for name, parameter in holder._parameters.items()
        if parameter is not None and id(parameter) not in known
    ]


def _walk(parent: nn.Module, name: str, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    if type(module).__name__ == "NewGELUActivation":
        return [(parent, name, module, nn.GELU(approximate="tanh"))]  # the same function, spelt out in tensor products
    if _is_wrapper(module):
        return _swaps(parent, name, module) if getattr(module, "original_component", None) is not None else []
    found = []
    for child_name, child in list(module._modules.items()):
        if child is not None:
            found += _walk(module, child_name, child)
    return found


def find_sections(model: nn.Module) -> list[Section]:
    """The outermost wrappers in a Hugging Face model that a bridge has taken over."""
    sections: list[Section] = []

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if not _is_wrapper(child):
                visit(child)
            elif getattr(child, "original_component", None) is not None:
                sections.append(Section(parent, name, child))

    visit(model)
    return sections


@contextlib.contextmanager
def bypass(sections: list[Section]) -> Iterator[None]:
    """Take the wrappers out of all sections without hooks; put them back afterwards."""
    done = []
    try:
        for section in sections:
            if section.idle():
                for parent, name, wrapper, original in section.swaps:
                    parent._modules[name] = original
                    done.append((parent, name, wrapper))
        yield
    finally:
        for parent, name, wrapper in reversed(done):
            parent._modules[name] = wrapper
