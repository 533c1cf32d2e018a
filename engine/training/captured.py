"""A step as one CUDA graph: the host launches it whole, where launching ops takes it longer than
the device takes to do them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..methods import Now, Terms

# Steps that are taken as usual before: networks compile, cuDNN searches, optimisers and meters
# make their state.
WARM_UP = 3


class Graph(Protocol):
    """What work does to memory, to be done again."""

    def aside(self) -> AbstractContextManager[None]:
        """Where the work is done before it is recorded."""

    def record(self, work: Callable[[], Terms]) -> Terms:
        """Take down what the work does, without doing it: what it gives, at each replay anew."""

    def replay(self) -> None:
        """Do it."""


class CudaGraph:
    """A graph of the current device. Nothing recorded may wait for it, or draw on the host."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        # Of the steps before as well: backward must meet no other stream's work when it records.
        self._stream = torch.cuda.Stream()

    def aside(self) -> AbstractContextManager[None]:
        return _Aside(self._stream)

    def record(self, work: Callable[[], Terms]) -> Terms:
        self._graph = torch.cuda.CUDAGraph()  # one takes a single recording
        # A loader's threads may go on to allocate memory and to ask for events meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()


class _Aside:
    """Work on a stream, behind what was given to the current one and before what will be."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self._stream)


class Captured:
    """The same step, from its fourth call on as a graph.

    What it reads beside its batch has to stay where it is: weights, optimisers' states, meters and
    `now`, all of which are changed in place. States that are loaded lie elsewhere, and it is
    recorded anew. Batches have one shape; each is copied to where the
    first one lay. The terms that it gives are those of the last step, in one place.
    """

    def __init__(
        self, step: Callable[..., Terms], optimizers: Iterable[Optimizer], graph: Graph
    ) -> None:
        self._step, self._graph = step, graph
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            optimizer.register_load_state_dict_post_hook(lambda _: self._forget())
        self._taken = 0
        self._inputs: list[Tensor] = []
        self._terms: Terms = {}

    def __call__(self, now: Now, *batch: Tensor) -> Terms:
        """Train on a batch with the numbers in `now`, the same object each time.

        Raises ValueError for a batch of another shape or type.
        """
        self._taken += 1
        if self._taken <= WARM_UP:
            with self._graph.aside():
                return self._step(now, *batch)
        if not self._inputs:
            self._inputs = [part.clone() for part in batch]
            self._record(now)
        for held, given in zip(self._inputs, batch, strict=True):
            if (held.shape, held.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"a captured step takes batches of {held.dtype} {tuple(held.shape)}, got "
                    f"{given.dtype} {tuple(given.shape)}"
                )
            held.copy_(given)
        self._graph.replay()
        return self._terms

    def _forget(self) -> None:
        self._taken, self._inputs, self._terms = 0, [], {}

    def _record(self, now: Now) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if "capturable" in group:  # of torch's, which else refuse to be recorded
                    group["capturable"] = True
        try:
            self._terms = self._graph.record(lambda: self._step(now, *self._inputs))
        except RuntimeError as error:
            raise RuntimeError(
                "run.capture: this step cannot be recorded as a CUDA graph, something in it waits "
                f"for the device or works on the host; set run.capture=false: {error}"
            ) from error
