"""A tape in one launch on an accelerator: its calls in a graph (CUDA Graphs)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from droptune.trainers.recording import Operation, Recording
from droptune.trainers.tape import COPIES, Tape


class GraphPool:
    """Memory that operations need for themselves; shared by graphs that never run at once."""

    def __init__(self) -> None:
        self.graphs: WeakSet[Any] = WeakSet()

    @property
    def memory(self) -> Any:
        """That of its graphs; None where there are none, or none any longer: torch lets nobody
        use a memory again that all its graphs have left."""
        return next((graph.pool() for graph in self.graphs), None)


class Captured:
    """Plays a tape, one that does not need the host, without a launch for each of its calls.

    They are done once more for it, but nothing is computed: a graph keeps them with all addresses,
    and a tape's memory stays in place. Raises what the device says where it cannot keep a call.
    """

    def __init__(self, tape: Tape, device: torch.device, pool: GraphPool) -> None:
        self._tape = tape
        self._graph = _graph(device)
        here, aside = torch.accelerator.current_stream(device), _stream(device)
        aside.wait_stream(here)
        with aside:
            _begin(self._graph, pool)
            try:
                tape.run()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong was said before
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        here.wait_stream(aside)
        pool.graphs.add(self._graph)

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, until a tape of the same pool is played again."""
        self._tape.take(inputs)
        self._graph.replay()
        return self._tape.outputs


def needs_host(recording: Recording) -> bool:
    """Whether a graph of its tape would fail, or give other numbers."""
    return any(_needs_host(operation, recording.outside) for operation in recording.operations)


def _needs_host(operation: Operation, outside: Mapping[int, Tensor]) -> bool:
    """Whether it copies between host and device, or changes host memory that was there before. A
    number of the host is none of these: a launch takes it along."""
    views = (*operation.given, *operation.results)
    on_host = [view for view in views if view.device.type == "cpu"]
    if len(on_host) == len(views):
        return not operation.written.isdisjoint(outside)
    copies = operation.function in (*COPIES, torch.ops.aten.copy_.default)
    return any(copies or view.size for view in on_host)


@functools.cache
def _stream(device: torch.device) -> torch.Stream:
    """Where graphs are captured. There is one of a device: libraries keep memory for each."""
    return torch.Stream(device)


def _graph(device: torch.device) -> Any:
    return torch.cuda.CUDAGraph() if device.type == "cuda" else torch.accelerator.Graph()


def _begin(graph: Any, pool: GraphPool) -> None:
    """What other threads do meanwhile, like pinning memory, is no fault."""
    if isinstance(graph, torch.cuda.CUDAGraph):
        graph.capture_begin(pool=pool.memory, capture_error_mode="thread_local")
    else:
        graph.graph_pool = pool.memory
        graph.capture_begin()
