"""vAttention as a technique: it switches the KV cache to kernels/kv_memory, which does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from core.bundle import Bundle
from core.errors import UnsupportedModel
from core.reversible import Edits
from core.technique import Effect, Label, Prepared, Report, Stage, Technique, option
from core.units import format_bytes
from kernels.kv_memory.cuda_region import cuda_driver
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.shared_prefix import sharing_works


@dataclass(frozen=True)
class VAttention(Technique):
    """KV cache contiguous in virtual memory: the whole context is reserved, pages are committed as tokens come.

    Source: vAttention (arXiv 2405.04437), sections 5 and 6. Deviates: for one request at a time; on a CPU over mmap in place of the CUDA
    driver's calls, where a background thread commits the next page group while the model computes.
    """

    name: ClassVar[str] = "vattention"
    title: ClassVar[str] = "vAttention KV cache"
    summary: ClassVar[str] = "Reserves address space for the whole context and commits memory page group by page group; nothing is ever copied."
    effect: ClassVar[Effect] = Effect.LOSSLESS
    stage: ClassVar[Stage] = Stage.CACHE
    counter: ClassVar[str] = "kv_reserved_bytes"

    keep_mib: int = option(256, "Committed memory kept between requests, MiB; the next one finds it warm", minimum=0, maximum=65536, step=64)

    def check(self, bundle: Bundle) -> None:
        """Refuses systems without reservations, and models whose cache is not keys and values.

        Raises:
            UnsupportedModel: with the reason.
        """
        super().check(bundle)
        if bundle.device.type == "cpu" and not reservations_work():
            raise UnsupportedModel(f"{self.title}: this system does not reserve memory without committing it; it needs Linux.")
        if bundle.device.type != "cpu" and cuda_driver(bundle.device) is None:
            raise UnsupportedModel(f"{self.title}: the model is on {bundle.device}, whose memory only the CUDA driver (libcuda.so.1) can reserve; there is none here.")
        kv_layouts(bundle)

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        layouts = kv_layouts(bundle)
        pool = ReservationPool(layouts, bundle.context_length, self.keep_mib * 2**20, bundle.device)
        edits.set_attr(bundle, "cache_factory", pool.cache)
        driver = cuda_driver(bundle.device)
        token = sum(layout.token_bytes for layout in layouts)
        unshared = "this system has no sealed files in memory" if driver is None else "pages of a device are not shared"
        notes = (
            f"{format_bytes(token * bundle.context_length)} of address space reserved for {bundle.context_length:,} tokens, {format_bytes(token)} committed a token "
            f"in page groups of {format_bytes(PAGE_GROUP if driver is None else driver.granularity())}",
            "prompts that begin like an earlier one go on from its cache; "
            + ("whole page groups of what they have in common are in memory once" if driver is None and sharing_works() else f"what two texts have in common is copied: {unshared}"),
        )
        return Report(self.name, Label.EXECUTED, ("cache_factory",), notes=notes), ()


def reserved_cache(bundle: Bundle) -> bool:
    """Whether the bundle's cache is one of a ReservationPool."""
    return isinstance(getattr(bundle.cache_factory, "__self__", None), ReservationPool)


def kv_layouts(bundle: Bundle) -> tuple[KVLayout, ...]:
    """The layout of each layer's keys and values, from the model's configuration.

    Raises:
        UnsupportedModel: the configuration does not say, or layers keep something else.
    """
    config: Any = bundle.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    try:
        heads = int(config.num_attention_heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        layers = int(config.num_hidden_layers)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModel(f"vAttention KV cache (vattention): {bundle.info.model_id} does not say how many heads and layers it has ({error}).") from error
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "kv_lora_rank", None) or bundle.model.get_output_embeddings() is None:
        raise UnsupportedModel(f"vAttention KV cache (vattention): {bundle.info.model_id} has layers that keep other state than keys and values.")
    dtype = next(bundle.model.parameters()).dtype
    return (KVLayout(int(getattr(config, "num_key_value_heads", None) or heads), int(getattr(config, "num_key_value_heads", None) or heads), dim, dtype),) * layers
