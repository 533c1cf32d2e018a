"""A graph of a step on the CPU: the ops that it did, done again on the same memory.

As a CUDA graph it knows nothing of Python: an op has the numbers that it had, and reads and writes
where it did. So what a step reads from the host, or from memory that is another one in the next
step, is wrong in a replay.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ReplayedOps(TorchDispatchMode):
    """`Graph` of captured.py. Recording does the work, so that the first replay does nothing."""

    def __init__(self):
        super().__init__()
        self.ops = []
        self.done = False
        self.replays = 0

    def aside(self):
        return nullcontext()

    def record(self, work):
        self.ops, self.done = [], True
        with self:
            return work()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.name() == "aten::_local_scalar_dense":
            raise RuntimeError("a value is read on the host")
        out = op(*args, **kwargs)
        if not op.name().startswith("profiler::"):
            self.ops.append((op, args, kwargs, out))
        return out

    def replay(self):
        self.replays += 1
        if self.done:
            self.done = False
            return
        with torch.no_grad():
            for op, args, kwargs, out in self.ops:
                for was, now in zip(
                    tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True
                ):
                    if isinstance(was, torch.Tensor) and was.data_ptr() != now.data_ptr():
                        was.copy_(now)
