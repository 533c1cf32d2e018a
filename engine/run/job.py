"""What started this process and may start it again: an agent of torchrun, or Slurm."""

from __future__ import annotations

import os
import time
from pathlib import Path


def under_torchrun() -> bool:
    """Whether an agent stands above this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starts_again() -> bool:
    """Whether the same command may be started again without anybody's asking for it."""
    return under_torchrun() or "SLURM_JOB_ID" in os.environ


def restarted() -> bool:
    """Whether the agent did so, after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def name() -> str | None:
    """What the job is called each time that it is started; None where it has no name."""
    if job := os.environ.get("SLURM_JOB_ID"):  # a requeued job has its number, its agents are new
        return f"slurm {job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for no --rdzv-id
    return None if run == "none" else f"torchrun {run}"


def age() -> float:
    """Seconds since this process began, or the agent above it, which outlives its processes."""
    pid = os.getppid() if under_torchrun() else os.getpid()
    _, _, facts = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")  # a name may have both
    ticks = int(facts.split()[19])  # from the start of the machine, field 22 of proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
