"""A tape in one launch on an accelerator: its calls in a graph (CUDA Graphs)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from droptune.trainers.tape import Tape


class GraphPool:
    """Memory that operations need for themselves, and the stream on which graphs are captured;
    shared by graphs of one device that never run at once."""

    memory: Any = None  # the first graph's
    stream: torch.Stream | None = None


class Captured:
    """Plays a tape without a launch for each of its calls.

    They are done once more for it, but nothing is computed: a graph keeps them with all addresses,
    and a tape's memory stays in place. Raises what the device says where a call needs the host.
    """

    def __init__(self, tape: Tape, device: torch.device, pool: GraphPool) -> None:
        self._tape = tape
        self._graph = _graph(device)
        here = torch.accelerator.current_stream(device)
        aside = pool.stream = pool.stream or torch.Stream(device)
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
        pool.memory = self._graph.pool()

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, until a tape of the same pool is played again."""
        self._tape.take(inputs)
        self._graph.replay()
        return self._tape.outputs


def _graph(device: torch.device) -> Any:
    return torch.cuda.CUDAGraph() if device.type == "cuda" else torch.accelerator.Graph()


def _begin(graph: Any, pool: GraphPool) -> None:
    """What other threads do meanwhile, like pinning memory, is no fault."""
    if isinstance(graph, torch.cuda.CUDAGraph):
        graph.capture_begin(pool=pool.memory, capture_error_mode="thread_local")
    else:
        graph.graph_pool = pool.memory
        graph.capture_begin()
