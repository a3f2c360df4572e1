"""A decode step as a list of operations over named buffers; where threads must wait for each other follows from what they touch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.packing import PackedWeight
from kernels.structures import MOST_TOKENS, Cached, Operation, Step, address

EMBED, ADD_ROW, NORM, SELECT, GEMV, ROTATE, HEAD_NORM, APPEND, ATTEND, ACTIVATE, PART, JOIN = range(12)
TOP_K, ABOVE, NONZERO = range(3)
_LINE = 16
"""Floats of one cache line: buffers begin at a multiple of it."""


@dataclass(frozen=True)
class Buffer:
    """A vector of `size` floats for each token. own: every thread has its own; else threads share it."""

    offset: int
    size: int
    own: bool

    def __add__(self, entries: int) -> Buffer:
        return Buffer(self.offset + entries, self.size - entries, self.own)

    @property
    def operand(self) -> int:
        """As the C library reads it."""
        return -1 - self.offset if self.own else self.offset


@dataclass(frozen=True)
class Rows:
    """Chosen input channels of a vector, in each thread's own memory."""

    offset: int
    counts: int
    size: int


@dataclass
class _Pending:
    """What threads have touched since they last met: place -> how the work on it was shared out."""

    written: dict[Any, Any] = field(default_factory=dict)
    read: dict[Any, set[Any]] = field(default_factory=dict)

    def must_wait(self, reads: list[tuple[Any, Any]], writes: list[tuple[Any, Any]]) -> bool:
        stale = any(place in self.written and (self.written[place] != how or how is None) for place, how in (*reads, *writes))
        return stale or any(how is None or self.read[place] != {how} for place, how in writes if place in self.read)

    def note(self, reads: list[tuple[Any, Any]], writes: list[tuple[Any, Any]]) -> None:
        for place, how in reads:
            self.read.setdefault(place, set()).add(how)
        self.written.update(writes)


class Program:
    """Built once for a model, run for every token.

    Args:
        stride: the widest vector but for the logits.
        layers: of the model.
        vocabulary: logits a token.
        threads: that run it.
    """

    def __init__(self, stride: int, layers: int, vocabulary: int, threads: int) -> None:
        self.stride = -(-stride // _LINE) * _LINE
        self.layers, self.vocabulary, self.threads = layers, vocabulary, threads
        self.operations: list[Operation] = []
        self.keep: list[Any] = []
        """Tensors that operations point into."""
        self._shared_end, self._own_end, self._rows_end = _LINE, _LINE, 0
        self._pending = _Pending()
        self.products: list[Product] = []
        """Every product of a step, for counting what it reads."""
        self.logits = self.shared(vocabulary, stride=-(-vocabulary // _LINE) * _LINE)

    def shared(self, size: int, stride: int | None = None) -> Buffer:
        """A new buffer that threads share."""
        buffer = Buffer(self._shared_end, size, False)
        self._shared_end += MOST_TOKENS * (stride or self.stride)
        return buffer

    def sums(self, width: int) -> Buffer:
        """Room for every thread's sums over its part of the input channels, `width` a token."""
        buffer = Buffer(self._shared_end, width, False)
        self._shared_end += self.threads * MOST_TOKENS * width
        return buffer

    def own(self, size: int) -> Buffer:
        """A new buffer of which every thread has its own."""
        buffer = Buffer(self._own_end, size, True)
        self._own_end += MOST_TOKENS * self.stride
        return buffer

    def rows(self, size: int) -> Rows:
        """Room for the chosen channels of a vector of `size`."""
        made = Rows(self._rows_end + MOST_TOKENS, self._rows_end, size)
        self._rows_end += MOST_TOKENS * (size + 2)
        return made

    def emit(self, kind: int, *, reads: list[tuple[Any, Any]] | None = None, writes: list[tuple[Any, Any]] | None = None, keep: tuple[Any, ...] = (), **fields: Any) -> Operation:
        """Append an operation.

        Args:
            reads, writes: (place, how) of shared memory. `how` names the way the work is shared out: the same entries go to the same
                thread wherever it is the same name; None is anyone's.
            keep: tensors that its pointers point into.
        """
        reads, writes = reads or [], writes or []
        wait = self._pending.must_wait(reads, writes)
        if wait:
            self._pending = _Pending()
        self._pending.note(reads, writes)
        operation = Operation(kind=kind, wait=wait, stride=self.stride, rows=-1, counts=-1, together=1, factor=1.0, **fields)
        self.operations.append(operation)
        self.keep.extend(k for k in keep if k is not None)
        return operation

    def written(self, *buffers: Buffer) -> None:
        """Say that the last operation wrote these too: pieces of what it names."""
        self._pending.note([], [(buffer, None) for buffer in buffers])

    def select(self, source: Buffer, size: int, mode: int, *, keep: int = 0, threshold: float = 1.0, exempt: int = 0) -> Rows:
        """Choose channels of `source`, every thread for itself."""
        rows = self.rows(size)
        operation = self.emit(SELECT, reads=_whole(source), from_=source.operand, n=size, mode=mode, exempt=exempt)
        operation.keep = keep
        operation.rows, operation.counts, operation.factor = rows.offset, rows.counts, threshold
        return rows

    def norm(self, source: Buffer, to: Buffer, size: int, gain: Tensor | None, shift: Tensor | None, eps: float, centre: bool) -> None:
        """Norm into a buffer of each thread's own."""
        assert to.own
        self.emit(NORM, reads=_whole(source), keep=(gain, shift), from_=source.operand, to=to.operand, n=size, gain=address(gain), shift=address(shift), eps=eps, add=centre)

    def multiply(self, products: list[Product]) -> None:
        """Matrices times vectors; products given together share out their blocks between the threads."""
        head = len(self.operations)
        self.products += products
        writes: list[tuple[Any, Any]] = [(product.to, None) for product in products]
        reads = [pair for product in products for pair in _whole(product.source)] + [(p.to, None) for p in products if p.add]
        for product in products:
            first = len(self.operations) == head
            operation = self.emit(GEMV, reads=reads if first else [], writes=writes if first else [], keep=(product.weight, product.bias),
                                  from_=product.source.operand, to=product.to.operand, add=product.add)
            operation.n, operation.factor = self.stride, product.factor
            operation.stride = -(-self.vocabulary // _LINE) * _LINE if product.to == self.logits else self.stride
            operation.matrix = product.weight.matrix(product.bias)
            if product.rows is not None:
                operation.rows, operation.counts = product.rows.offset, product.rows.counts
        self.operations[head].together = len(products)

    def multiply_in_parts(self, weight: PackedWeight, source: Buffer, rows: Rows | None, sums: Buffer, outputs: list[Output]) -> None:
        """One matrix times a vector, its input channels shared out between the threads; then the parts' sums are joined, output by output."""
        self.products.append(Product(weight, None, source, sums, rows))
        width = sums.size
        operation = self.emit(PART, reads=_whole(source), writes=[(sums, None)], keep=(weight,), from_=source.operand, to=sums.operand, head_stride=width)
        operation.matrix = weight.matrix()
        if rows is not None:
            operation.rows, operation.counts = rows.offset, rows.counts
        for output in outputs:
            how = [(output.to, ("heads", output.heads) if output.heads else "entries")]
            joined = self.emit(JOIN, reads=[(sums, None), *(how if output.add else [])], writes=how, keep=(output.scale, output.bias), from_=(sums + output.start).operand,
                               to=output.to.operand, head_stride=width, n=output.size, heads=output.heads, gain=address(output.scale), shift=address(output.bias), add=output.add)
            joined.factor = output.factor

    def finish(self, score_room: int) -> LoadedProgram:
        """The program with its memory."""
        return LoadedProgram(self, score_room, self._shared_end, self._own_end, self._rows_end)


@dataclass(frozen=True)
class Product:
    """to = factor * (weight source + bias), or added to it; only `rows` of source where given."""

    weight: PackedWeight
    bias: Tensor | None
    source: Buffer
    to: Buffer
    rows: Rows | None = None
    add: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Output:
    """to[size] = factor * (scale * sums from `start` on + bias), or added to it; `heads`: in so many pieces, in any when 0."""

    to: Buffer
    size: int
    start: int
    scale: Tensor | None
    bias: Tensor | None
    heads: int = 0
    add: bool = False
    factor: float = 1.0


def _whole(buffer: Buffer) -> list[tuple[Any, Any]]:
    return [] if buffer.own else [(buffer, None)]


class LoadedProgram:
    """Operations and memory as one C structure. One step at a time."""

    def __init__(self, program: Program, score_room: int, shared: int, own: int, rows: int) -> None:
        self.program, self.threads = program, program.threads
        threads = program.threads
        self._operations = (Operation * len(program.operations))(*program.operations)
        self._layers = (Cached * program.layers)()
        own, rows = -(-own // _LINE) * _LINE + _LINE, -(-rows // _LINE) * _LINE + _LINE
        self._shared, self._own = torch.zeros(shared), torch.zeros(threads * own)
        self._rows, self._scores = torch.zeros(threads * rows, dtype=torch.int32), torch.zeros(threads * score_room)
        self._tokens = torch.zeros(MOST_TOKENS, dtype=torch.int64)
        self.score_room = score_room
        self._step = Step(
            ctypes.addressof(self._operations), ctypes.addressof(self._layers), address(self._shared), address(self._own), address(self._rows), address(self._scores),
            len(program.operations), own, rows, score_room, threads, address(self._tokens), 1, 0,
        )
        stride = -(-program.vocabulary // _LINE) * _LINE
        start = program.logits.offset
        self._logits = self._shared[start : start + MOST_TOKENS * stride].view(MOST_TOKENS, stride)[:, : program.vocabulary]

    def set_layer(self, index: int, cached: Cached) -> None:
        """Where a layer's keys and values lie."""
        self._layers[index] = cached

    def run(self, library: ctypes.CDLL, tokens: list[int], position: int) -> Tensor:
        """One step over 1 to MOST_TOKENS tokens that stand at `position` and after; logits [tokens, vocabulary], overwritten by the next."""
        for place, token in enumerate(tokens):
            self._tokens[place] = token
        self._step.token_count, self._step.position = len(tokens), position
        self._step.threads = self.threads
        library.fusebox_step(ctypes.byref(self._step))
        return self._logits[: len(tokens)]

    def weight_bytes_per_step(self, steps: int) -> int:
        """Bytes of weights that a step reads, by the rows that were kept in `steps` steps so far."""
        kept = {operation.rows: operation.kept for operation in self._operations if operation.kind == SELECT}
        shares = [1.0 if p.rows is None else kept[p.rows.offset] / (max(1, steps) * p.rows.size) for p in self.program.products]
        return round(sum(p.weight.nbytes * share for p, share in zip(self.program.products, shares, strict=True)))

    def kept_rows(self) -> list[int]:
        """Rows that each SELECT kept since the start, in program order."""
        return [operation.kept for operation in self._operations if operation.kind == SELECT]
