"""Engines by (model, revision, dtype, techniques): built once, never changed, dropped least recently used first."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

from core.bundle import Bundle
from core.errors import InvalidRequest, OutOfMemory
from core.loading import load_bundle
from core.memory import total_bytes
from core.prepared_cache import calibrates
from core.progress import Progress, silent
from core.provenance import cpu_name
from core.technique import Technique
from engines.dtype_choice import DtypeChoice, faster_dtype
from engines.engine import Engine, baseline_engine, fused_engine
from engines.methods import depends_on_model, members_of, method_name

log = logging.getLogger(__name__)

AUTO = "auto"
MAX_ENGINES = 24


@dataclass(frozen=True)
class EngineKey:
    """What makes an engine. `dtype` is auto, float32 or bfloat16; `method` spells the techniques.

    calibration: the user's text that techniques were calibrated on, empty for the project's own.
    """

    model_id: str
    revision: str | None
    dtype: str
    method: str
    calibration: str = ""


class EnginePool:
    """Owns engines within a byte budget. Safe to use from several threads."""

    def __init__(self, budget_bytes: int | None = None, device: str = "cpu", allow_local: bool = True) -> None:
        self.budget_bytes = budget_bytes or int(total_bytes() * 0.6)
        self.device = device
        self.allow_local = allow_local
        self._engines: OrderedDict[EngineKey, Engine] = OrderedDict()
        self._choices: dict[EngineKey, DtypeChoice] = {}
        self._lock = threading.RLock()
        self._building = threading.Lock()

    def get(self, model_id: str, techniques: tuple[Technique, ...] = (), *, revision: str | None = None,
            dtype: str = AUTO, calibration: str = "", progress: Progress = silent) -> Engine:
        """The engine for a model and techniques, built now if it is not there.

        Args:
            calibration: text that techniques calibrate on; empty for the project's own. Those that do not calibrate ignore it.

        Raises:
            what `load_bundle` and the techniques raise; the pool is as before then.
        """
        key = EngineKey(model_id, revision, dtype, method_name(techniques), calibration if any(map(calibrates, techniques)) else "")
        found = self._find(key)
        if found is not None:
            return found
        with self._building:  # one build at a time: two would fight for memory and cores
            try:
                return self._find(key) or self._build(key, techniques, progress)
            except OutOfMemory:
                if not self.unload():
                    raise
                log.info("dropped all engines to make room for %s", key)
                return self._build(key, techniques, progress)

    def get_method(self, method: str, model_id: str, *, revision: str | None = None, dtype: str = AUTO, calibration: str = "", progress: Progress = silent) -> Engine:
        """The engine for a method as typed; what `all_combined` stands for is found on the model itself.

        Raises:
            what `get` and `parse_method` raise.
        """
        base = self.get(model_id, revision=revision, dtype=dtype, progress=progress).bundle if depends_on_model(method) else None
        return self.get(model_id, members_of(method, base).techniques, revision=revision, dtype=dtype, calibration=calibration, progress=progress)

    def _build(self, key: EngineKey, techniques: tuple[Technique, ...], progress: Progress) -> Engine:
        base_key = EngineKey(key.model_id, key.revision, key.dtype, method_name(()))
        texts = [key.calibration] if key.calibration else None
        if self._find(base_key) is None and any(t.drops_originals for t in techniques):  # a baseline beside it would keep the originals
            return self._add(key, fused_engine(self._load(base_key, progress), techniques, progress, texts, in_place=True))
        base = self._find(base_key) or self._add(base_key, baseline_engine(self._load(base_key, progress)))
        return base if key == base_key else self._add(key, fused_engine(base.bundle, techniques, progress, texts))

    def dtype_choice(self, model_id: str, *, revision: str | None = None, dtype: str = AUTO) -> DtypeChoice | None:
        """How the baseline's dtype was chosen; None when it was asked for, or the model is not loaded."""
        with self._lock:
            loaded = any((k.model_id, k.revision, k.dtype) == (model_id, revision, dtype) for k in self._engines)
        return self._choices.get(EngineKey(model_id, revision, dtype, method_name(()))) if loaded else None

    def holds(self, model_id: str, *, revision: str | None = None, dtype: str = AUTO) -> bool:
        """Whether the model's baseline is loaded, so that nothing needs to be looked up or downloaded."""
        with self._lock:
            return EngineKey(model_id, revision, dtype, method_name(())) in self._engines

    def unload(self, model_id: str | None = None) -> int:
        """Drop the engines of a model, or all; returns how many. Running answers finish on what they hold."""
        with self._lock:
            keys = [k for k in self._engines if model_id in (None, k.model_id)]
            for key in keys:
                del self._engines[key]
            self._choices = {k: c for k, c in self._choices.items() if model_id not in (None, k.model_id)}
        gc.collect()
        return len(keys)

    def keys(self) -> list[EngineKey]:
        """What is loaded, least recently used first."""
        with self._lock:
            return list(self._engines)

    def held_bytes(self) -> int:
        """Bytes of all weights the pool keeps alive; tensors that engines share count once."""
        with self._lock:
            sizes: dict[int, int] = {}
            for engine in self._engines.values():
                sizes.update(engine.storages())
            return sum(sizes.values())

    def _find(self, key: EngineKey) -> Engine | None:
        with self._lock:
            if key in self._engines:
                self._engines.move_to_end(key)
            return self._engines.get(key)

    def _load(self, key: EngineKey, progress: Progress) -> Bundle:
        def load(dtype: str) -> Bundle:
            return load_bundle(key.model_id, revision=key.revision, dtype=dtype, device=self.device, allow_local=self.allow_local, progress=progress)

        if key.dtype != AUTO:
            return load(key.dtype)
        if key in self._choices:  # the baseline was dropped, engines made from it may still be there
            return load(self._choices[key].dtype)
        try:
            full = load("float32")
        except OutOfMemory as error:
            bundle = load("bfloat16")
            self._choices[key] = DtypeChoice("bfloat16", {"bfloat16": None}, f"not timed against float32, which does not fit: {error}")
            return bundle
        progress(0.95, "timing fp32 against bf16")
        bundle, self._choices[key] = faster_dtype(full, lambda: load("bfloat16"))
        log.info("%s on %s: %s", key.model_id, cpu_name(), self._choices[key].reason)
        return bundle

    def _add(self, key: EngineKey, engine: Engine) -> Engine:
        engine.warm_up()
        with self._lock:
            self._engines[key] = engine
            while len(self._engines) > 1 and (len(self._engines) > MAX_ENGINES or self.held_bytes() > self.budget_bytes):
                dropped, _ = self._engines.popitem(last=False)
                log.info("dropped %s to stay within %d bytes and %d engines", dropped, self.budget_bytes, MAX_ENGINES)
        gc.collect()
        return engine


def check_dtype(dtype: object) -> str:
    """A dtype setting from outside, checked.

    Raises:
        InvalidRequest: not auto, float32 or bfloat16.
    """
    if dtype not in (AUTO, "float32", "bfloat16"):
        raise InvalidRequest(f"dtype is {str(dtype)[:30]!r}; use auto, float32 or bfloat16.")
    return str(dtype)
