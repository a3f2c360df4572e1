"""The only three ways to change a bundle: swap a module, add a hook, set an attribute. All are undone exactly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


def _is_managed(owner: Any, name: str) -> bool:
    """Whether setting `name` goes through a property or a map of names instead of the object's own table."""
    return isinstance(getattr(type(owner), name, None), property) or name in getattr(owner, "attribute_map", ())


@dataclass(frozen=True)
class _Released:
    """A parameter that a swapped-out module no longer holds, where it was, and how to get it back."""

    module: nn.Module
    name: str
    alive: weakref.ref[Tensor]
    read: Callable[[], Tensor]

    def parameter(self) -> Tensor:
        known = self.alive()
        return nn.Parameter(self.read(), requires_grad=False) if known is None else known


class Edits:
    """A journal of changes. `undo()` restores saved references, last change first; calling it again does nothing."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._swapped: list[tuple[str, nn.Module]] = []
        self._released: list[_Released] = []

    @property
    def replaced(self) -> list[nn.Module]:
        """Modules that were swapped out and are kept so that undo is exact."""
        return [module for _, module in self._swapped]

    def swap_module(self, root: nn.Module, path: str, new: nn.Module) -> None:
        """Put `new` at the dotted `path` below `root`."""
        parent_path, _, name = path.rpartition(".")
        parent = root.get_submodule(parent_path)
        old = parent.get_submodule(name)
        new.train(old.training)
        self._set_child(parent, name, new)
        self._swapped.append((path, old))
        self._undo.append(lambda: self._set_child(parent, name, old))

    def add_hook(self, register: Callable[..., Any], hook: Callable[..., Any], **kwargs: Any) -> None:
        """Register a hook, e.g. `add_hook(module.register_forward_pre_hook, fn)`."""
        handle = register(hook, **kwargs)
        self._undo.append(handle.remove)

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of any object, a parameter of a module included."""
        table = vars(owner)
        for store in ("_parameters", "_buffers", "_modules"):
            if isinstance(owner, nn.Module) and name in getattr(owner, store):
                table = getattr(owner, store)
        old = table.get(name, _ABSENT)
        if old is _ABSENT and hasattr(owner, name):  # a property, or a name that stands for another
            old = getattr(owner, name)
            inherited = name not in table and not _is_managed(owner, name)
            setattr(owner, name, value)
            self._undo.append(lambda: delattr(owner, name) if inherited else setattr(owner, name, old))
        elif old is _ABSENT:
            setattr(owner, name, value)
            self._undo.append(lambda: delattr(owner, name))
        else:
            table[name] = value
            self._undo.append(lambda: table.__setitem__(name, old))

    def release(self, reader: Callable[[str, Tensor], Callable[[], Tensor] | None]) -> None:
        """Stop holding those parameters of swapped-out modules that can be had again; undo gets them back.

        Args:
            reader: from a parameter's dotted name and values to a function that returns the same values, None where there is none. That
                function is called at undo, unless somebody else has kept the parameter, which is then put back itself.
        """
        for path, module in self._swapped:
            for name, parameter in module._parameters.items():
                read = None if parameter is None else reader(f"{path}.{name}", parameter)
                if read is not None and parameter is not None:
                    self._released.append(_Released(module, name, weakref.ref(parameter), read))
                    module._parameters[name] = None

    def forget(self) -> None:
        """Make the changes final: nothing is kept for undo, which from now on does nothing."""
        self._undo.clear()
        self._swapped.clear()
        self._released.clear()

    def undo(self) -> None:
        """Take every change back, last one first. An error while released parameters are read leaves all changes as they are."""
        back = [(item, item.parameter()) for item in self._released]
        for item, parameter in back:
            item.module._parameters[item.name] = parameter  # type: ignore[assignment]
        self._released.clear()
        while self._undo:
            self._undo.pop()()
        self._swapped.clear()

    @staticmethod
    def _set_child(parent: nn.Module, name: str, child: nn.Module) -> None:
        # Straight into the table keeps the children's order, which names and state dicts follow.
        parent._modules[name] = child
