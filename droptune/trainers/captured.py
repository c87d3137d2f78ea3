"""A recording as one launch on an accelerator: its operations in a graph (CUDA Graphs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from droptune.trainers.recording import Recording


class GraphPool:
    """Memory for what does not outlive a replay, and the stream on which graphs are captured;
    shared by graphs of one device that never run at once."""

    memory: Any = None  # the first graph's
    stream: torch.Stream | None = None


class Captured:
    """Does what a recorded function does, with other numbers, without Python or a launch for each
    operation in between.

    The function is called once more, for its operations and not for what they compute: that is
    captured with all addresses as they are. Raises what the device says where an operation needs
    the host.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        recording: Recording,
        pool: GraphPool,
    ) -> None:
        self._outside = recording.outside  # has to stay where it is
        self._inputs = [tensor.clone() for tensor in inputs]
        device = inputs[0].device
        self._graph = _graph(device)
        here = torch.accelerator.current_stream(device)
        aside = pool.stream = pool.stream or torch.Stream(device)
        aside.wait_stream(here)
        with aside:
            _begin(self._graph, pool)
            try:
                self._outputs = [output.detach() for output in function(*self._inputs)]
            except BaseException:
                with suppress(RuntimeError):  # what went wrong was said before
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        here.wait_stream(aside)
        pool.memory = self._graph.pool()

    @torch.no_grad()
    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, until this is played again."""
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._outputs


def _graph(device: torch.device) -> Any:
    return torch.cuda.CUDAGraph() if device.type == "cuda" else torch.accelerator.Graph()


def _begin(graph: Any, pool: GraphPool) -> None:
    """What other threads do meanwhile, like pinning memory, is no fault."""
    if isinstance(graph, torch.cuda.CUDAGraph):
        graph.capture_begin(pool=pool.memory, capture_error_mode="thread_local")
    else:
        graph.graph_pool = pool.memory
        graph.capture_begin()
