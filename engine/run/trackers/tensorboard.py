"""TensorBoard: a file of events in the run's folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..disk import Growing


class Board:
    """An event file in `folder`, written at once.

    PyTorch's SummaryWriter writes from a thread, which a full disk ends, and the run with it.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """From `purge_step` on, the numbers of earlier files in `folder` do not count.

        Raises OSError.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = Growing(folder / name)  # TensorBoard reads files in the order of their names
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of a step by name. OSError names the file; they are kept for later."""
        value = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._write(step=step, summary=self._summary(value=value))

    def close(self, finished: bool) -> str:
        self._file.close()
        return ""

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
