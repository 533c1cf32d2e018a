"""MLflow: a run of its own for each run, in the experiment MLFLOW_EXPERIMENT_NAME, or kdfuse."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .remote import Remote, TrackerError, in_words

PARAMS = 100  # of one call
LONGEST = 500  # characters of a parameter


def mlflow(folder: Path, config: Mapping[str, Any], known: str | None) -> tuple[Remote, str]:
    """The run in `folder` there, and its id: the one of the id `known`, or a new one.

    MLFLOW_TRACKING_URI says where that is. Raises TrackerError.
    """

    def write(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, [Metric(name, value, now, step) for name, value in values.items()])

    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient()
        if known is None:
            run = client.create_run(_experiment(client), run_name=folder.resolve().name).info.run_id
            params = [Param(name, str(value)[:LONGEST]) for name, value in config.items()]
            for first in range(0, len(params), PARAMS):
                client.log_batch(run, params=params[first : first + PARAMS])
        else:
            run = known
            client.update_run(run, status="RUNNING")
    except Exception as error:
        raise TrackerError(in_words("mlflow", error)) from error
    ends = {True: "FINISHED", False: "KILLED"}
    return Remote("mlflow", write, lambda finished: client.set_terminated(run, ends[finished])), run


def _experiment(client: Any) -> str:
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kdfuse")
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id
