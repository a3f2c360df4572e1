"""llama.cpp over a bundle's weights, through the low-level interface of llama-cpp-python: no sampling, no text."""

from __future__ import annotations

import ctypes
import logging
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.bundle import Bundle
from core.errors import FuseboxError, OutOfMemory
from engines.speed.peers.gguf_writer import write_gguf
from engines.speed.peers.peer import LlamaShape
from kernels.tiles import tiles_configured

_TILE_ROWS, _TILE_LINE_BYTES = (8, 8, 16, 16, 16, 16, 16, 16), (64, 64, 32, 32, 64, 64, 64, 64)
"""How its kernels for AMX configure a thread, once."""

_TRIALS = 3
_TRIAL_STEPS = 8


class LlamaCpp:
    """One GGUF model in memory with two contexts, flash attention off and on; `settle` keeps the faster. The cache is float16, as by default."""

    def __init__(self, path: Path, shape: LlamaShape, context: int, weight_bytes: int) -> None:
        """Load `path` with room for `context` tokens.

        Raises:
            OutOfMemory: llama.cpp gives no model or no context.
        """
        import llama_cpp as api

        self._api = api
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # its own default prints every tensor
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise OutOfMemory(f"llama.cpp did not load {path.name}; its log says why. Free memory or choose a smaller shape.")
        self.executor = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        self.settings: dict[str, Any] = {"threads": torch.get_num_threads(), "system_info": api.llama_print_system_info().decode().strip()}
        self.weight_bytes = weight_bytes
        self.kv_bytes_per_token = 4 * shape.layers * shape.kv_heads * shape.head_dim
        self._vocabulary = shape.vocabulary
        self._contexts = {on: self._new_context(context, on) for on in (False, True)}
        self._flash = True
        self._held = 0
        self._release = weakref.finalize(self, _free, api, list(self._contexts.values()), self._model)

    @classmethod
    def over(cls, bundle: Bundle, form: str, context: int) -> LlamaCpp:
        """Write the bundle as GGUF in `form`, load it and delete the file."""
        shape = LlamaShape.of(bundle, "llama.cpp")
        with tempfile.TemporaryDirectory(prefix="fusebox-gguf-") as folder:
            path = Path(folder) / f"model-{form}.gguf"
            return cls(path, shape, context, write_gguf(bundle, path, form))

    def _new_context(self, tokens: int, flash: bool) -> Any:
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_batch = parameters.n_ubatch = min(512, tokens)
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = api.llama_init_from_model(self._model, parameters)
        if not context:
            raise OutOfMemory(f"llama.cpp made no context of {tokens} tokens; its log says why. Free memory or choose a shorter context.")
        return context

    def settle(self, ids: Sequence[int], phase: str) -> None:
        """Time both kinds of attention in turns, in `phase` ("prefill" or "decode") after `ids`, and go on with the faster."""
        took: dict[bool, list[float]] = {False: [], True: []}
        for flash in (False, True, True, False) * _TRIALS:
            self._flash = flash
            took[flash].append(self._trial(ids, phase))
        self._flash = min(took, key=lambda flash: sorted(took[flash])[_TRIALS])
        self.settings["flash_attention"] = self._flash

    def _trial(self, ids: Sequence[int], phase: str) -> float:
        work: Callable[[], Any] = partial(self.prefill, ids)
        if phase == "decode":
            self.prefill(ids)
            work = partial(self._decode_some, ids[-1])
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _decode_some(self, token: int) -> None:
        for _ in range(_TRIAL_STEPS):
            self.decode(token)

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """As `Peer.prefill`, in batches of up to 512 tokens."""
        self._api.llama_memory_clear(self._memory(), False)
        self._held = 0
        with tiles_configured(_TILE_ROWS, _TILE_LINE_BYTES):
            for start in range(0, len(ids), 512):
                logits = self._run(ids[start : start + 512])
        return logits

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """As `Peer.decode`."""
        return self._run([token])

    def crop(self, tokens: int) -> None:
        """As `Peer.crop`."""
        self._held -= tokens
        self._api.llama_memory_seq_rm(self._memory(), 0, self._held, -1)

    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._contexts[self._flash])

    def _run(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        context = self._contexts[self._flash]
        tokens = (self._api.llama_token * len(ids))(*ids)
        status = self._api.llama_decode(context, self._api.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise FuseboxError(f"llama_decode of {len(ids)} tokens after {self._held} returned {status}.")
        self._held += len(ids)
        logits = self._api.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))


def _free(api: Any, contexts: list[Any], model: Any) -> None:
    for context in contexts:
        api.llama_free(context)
    api.llama_model_free(model)
