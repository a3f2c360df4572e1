"""OpenVINO's CPU plugin over a bundle's weights, set to latency; everything else as a person gets it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from core.bundle import Bundle
from engines.speed.peers.openvino_graph import LlamaGraph
from engines.speed.peers.peer import LlamaShape

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""What the float32 form is compiled with; int8 keeps the plugin's own choice."""
_RECORDED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")
_BEAM = np.zeros(1, dtype=np.int32)


class OpenVino:
    """One compiled stateful model and its request."""

    def __init__(self, graph: Any, shape: LlamaShape, weight_bytes: int, exact: bool) -> None:
        """Compile `graph`; `exact` asks for float32 sums and cache."""
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(), **(_EXACT if exact else {})}
        compiled = openvino.Core().compile_model(graph, "CPU", settings)
        self.executor = f"OpenVINO {version('openvino')}"
        self.settings: dict[str, Any] = {name.lower(): _plain(compiled.get_property(name)) for name in _RECORDED}
        self.settings["operations"] = _operations(compiled)
        self.weight_bytes = weight_bytes
        self.kv_bytes_per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * int(compiled.get_property("KV_CACHE_PRECISION").size)
        self._request = compiled.create_infer_request()
        self._ids: list[int] = []

    @classmethod
    def over(cls, bundle: Bundle, form: str = "int8") -> OpenVino:
        """The bundle's model in one of `openvino_graph.FORMS`."""
        graph = LlamaGraph(bundle, form)
        built = graph.build()
        return cls(built, graph.shape, graph.weight_bytes, form == "float32")

    def settle(self, ids: Sequence[int], phase: str) -> None:
        """As `Peer.settle`: the plugin has chosen by itself."""

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """As `Peer.prefill`, in one call."""
        self._request.reset_state()
        self._ids = []
        return self._run(ids)

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """As `Peer.decode`."""
        return self._run([token])

    def crop(self, tokens: int) -> None:
        """As `Peer.crop`, by reading what is kept again: a state is not shortened without a conversion."""
        self.prefill(self._ids[: len(self._ids) - tokens])

    def _run(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        past = len(self._ids)
        self._ids += ids
        feed = {"input_ids": np.array([ids], dtype=np.int64), "position_ids": np.arange(past, len(self._ids), dtype=np.int64)[None], "beam_idx": _BEAM}
        logits: np.ndarray[Any, Any] = self._request.infer(feed, share_inputs=True, share_outputs=True)["logits"][0, 0]
        return logits


def _plain(value: Any) -> str | int:
    return int(value) if isinstance(value, int) else getattr(value, "to_string", lambda: str(value))()


def _operations(compiled: Any) -> dict[str, int]:
    """How many operations of each kind the plugin runs: shows what it fused."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        kind = node.get_rt_info()["layerType"].astype(str)
        counts[kind] = counts.get(kind, 0) + 1
    return {kind: n for kind, n in counts.items() if kind not in ("Const", "Input", "Output")}
