"""Which rivals there are, in which weights, what of ours each is measured against, and what it needs installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from core.bundle import Bundle
from core.errors import InvalidRequest, MissingDependency
from engines.speed.peers.own_thread import OwnThread, here
from engines.speed.peers.peer import Peer

WEIGHTS = {"llama.cpp": ("Q8_0", "Q4_0", "BF16"), "openvino": ("int8",)}
"""Forms of the weights that each rival is measured in."""

COUNTERPARTS = {
    "llama.cpp:Q8_0": ("native+int8:bfloat16", "native+int8+larosa:bfloat16"),
    "llama.cpp:Q4_0": ("native+int4:bfloat16",),
    "llama.cpp:BF16": ("native:bfloat16", "native+vattention:bfloat16"),
    "openvino:int8": ("native+int8:bfloat16",),
}
"""Our methods that store about the same bytes: each is measured in turns with the rival."""

PACKAGES = {"llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, "openvino": {"openvino": "openvino"}}
"""Modules that a rival imports, and the packages they come in."""


def peer_methods(names: Sequence[str]) -> tuple[str, ...]:
    """`llama.cpp` -> one method for each form of its weights; `llama.cpp:Q8_0` is itself. Each once, in order.

    Raises:
        InvalidRequest: unknown rival or form; lists what there is.
    """
    methods: dict[str, None] = {}
    for name in names:
        peer, colon, form = name.strip().partition(":")
        if peer not in WEIGHTS or (colon and form not in WEIGHTS[peer]):
            offered = ", ".join((*WEIGHTS, *COUNTERPARTS))
            raise InvalidRequest(f"There is no rival {name[:40]!r}; there are {offered}.")
        methods.update(dict.fromkeys([f"{peer}:{one}" for one in ((form,) if colon else WEIGHTS[peer])]))
    return tuple(methods)


def require(method: str) -> None:
    """See that a rival's packages are there.

    Raises:
        MissingDependency: names what is missing and how to install it.
    """
    peer = method.partition(":")[0]
    missing = [package for module, package in PACKAGES[peer].items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependency(f"{method} is not measured: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. Run pip install -r requirements-peers.txt.")


def load_peer(method: str, bundle: Bundle, context: int) -> Peer:
    """A rival over a bundle's weights, with room for `context` tokens; `method` as `peer_methods` gives it.

    Raises:
        MissingDependency: its packages are not installed.
        UnsupportedModel: it is not of plain Llama architecture.
    """
    require(method)
    peer, _, form = method.partition(":")
    if peer == "llama.cpp":
        from engines.speed.peers.llama_cpp_runner import LlamaCpp

        return LlamaCpp.over(bundle, form, context)
    from engines.speed.peers.openvino_runner import OpenVino

    return OpenVino.over(bundle, form)


def thread_for(method: str) -> Callable[..., Any]:
    """Calls a function where a rival must run: `thread_for(method)(function, *args)`."""
    return OwnThread() if method.partition(":")[0] == "openvino" else here
