"""What this machine has for training, what is missing, and the cure."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["ok", "absent", "wrong"]


class Finding(NamedTuple):
    """`state`: ok; absent, which costs speed or a feature; wrong, which stops a run."""

    what: str
    state: State
    detail: str


def doctor() -> list[Finding]:
    """Look at the installation and the machine; nothing is changed and nothing downloaded."""
    checks: list[Callable[[], list[Finding]]] = [
        _packages,
        _optional_packages,
        _apex,
        _compiled_losses,
        _backends,
        _gpu_losses,
        _compilers,
        _gpus,
        _cores,
    ]
    return [finding for check in checks for finding in check()]


def _version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _packages() -> list[Finding]:
    found = []
    for name in ("torch", "torchvision", "numpy", "pillow", "scikit-learn"):
        got = _version(name)
        cure = f"not installed; pip install {name}"
        found.append(Finding(name, "ok", got) if got else Finding(name, "wrong", cure))
    return found


def _optional_packages() -> list[Finding]:
    dali = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
    absent = {
        ("triton",): "the triton backend is off; pip install triton (Linux)",
        dali: "images are read with torchvision, slower; pip install 'kdfuse[dali]'",
        ("tensorboard",): "log.jsonl alone is written; pip install 'kdfuse[tensorboard]'",
        ("wandb",): "run.trackers=[wandb] is refused; pip install wandb",
        ("mlflow", "mlflow-skinny"): "run.trackers=[mlflow] is refused; pip install mlflow",
        ("timm",): "networks timm:NAME, lamb and lars are refused; pip install 'kdfuse[timm]'",
        ("onnxscript",): "kdfuse export writes no .onnx; pip install 'kdfuse[onnx]'",
        ("onnxruntime",): "a .onnx is not run once it is written; pip install 'kdfuse[onnx]'",
        ("safetensors",): "kdfuse export writes no .safetensors; pip install 'kdfuse[safetensors]'",
        ("pycocotools",): "detectors are not evaluated; pip install 'kdfuse[detection]'",
    }
    found = []
    for names, cure in absent.items():
        got, what = _version(*names), "dali" if names is dali else names[0]
        found.append(Finding(what, "ok", got) if got else Finding(what, "absent", cure))
    return found


def _apex() -> list[Finding]:
    from ..training.largebatch import is_nvidias_apex

    nvidias = is_nvidias_apex()
    if nvidias is None:
        return []  # optional, and nothing here needs it
    if nvidias:
        return [Finding("apex", "ok", f"NVIDIA's, {_version('apex') or 'version unknown'}")]
    text = (
        "the package named apex on PyPI is another project, not NVIDIA's: optim.name=lamb takes "
        "timm's; pip uninstall apex, and build https://github.com/NVIDIA/apex from source if you "
        "want its fused one (kdfuse does not need it)"
    )
    return [Finding("apex", "absent", text)]


def _compiled_losses() -> list[Finding]:
    from ...kernels.backends import compiled

    cpu, reason = compiled()
    if cpu is None:
        return [Finding("compiled losses", "absent", f"losses run slower: {reason}")]
    text = f"SIMD {cpu.level()} (this machine runs {', '.join(cpu.levels())})"
    return [Finding("compiled losses", "ok", f"{text}, compiler {cpu.compiler}")]


def _backends() -> list[Finding]:
    from ...kernels.backends import backends, rules

    return [
        *[
            Finding(f"backend {name}", "absent" if why else "ok", why or "ready")
            for name, why in backends().items()
        ],
        *[Finding("backend of a GPU", "ok", line) for line in rules()],
    ]


def _gpu_losses() -> list[Finding]:
    """The fused losses on this machine's own device, beside the reference."""
    import torch

    from ...kernels.backends import backends
    from ...kernels.selfcheck import disagreements

    if not torch.cuda.is_available():
        return []
    found = []
    for name in ("cuda", "triton"):
        if backends()[name]:
            continue
        wrong = disagreements(name, "cuda")
        detail = "; ".join(wrong) or "every loss agrees with the reference on this device"
        found.append(Finding(f"losses by {name}", "wrong" if wrong else "ok", detail))
    return found


def _compilers() -> list[Finding]:
    cxx = os.environ.get("CXX")
    found = next((c for c in (cxx, "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if found:
        compiler = Finding("C++ compiler", "ok", _first_line([found, "--version"]))
    else:
        cure = "needed only to build from source and for torch.compile on a CPU; install g++"
        compiler = Finding("C++ compiler", "absent", cure)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc:
        text = _first_line([nvcc, "--version"], "release")
        return [compiler, Finding("nvcc", "ok", text)]
    cure = "needed only to build the cuda backend from source; install the CUDA toolkit"
    return [compiler, Finding("nvcc", "absent", cure)]


def _first_line(command: list[str], word: str = "") -> str:
    """First line of what the command prints that holds `word`."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if word in line]
    return lines[0] if lines else f"{command[0]} gives no version (exit code {done.returncode})"


def _gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            Finding(
                f"GPU {number}",
                "ok",
                f"{card.name}, {card.total_memory / 2**30:.0f} GiB, "
                f"compute capability {card.major}.{card.minor}",
            )
            for number, card in enumerate(cards)
        ]
    if torch.version.cuda is None:
        cure = "this torch is built without CUDA; for a GPU install one from pytorch.org"
    else:
        cure = f"torch sees none (it is built for CUDA {torch.version.cuda}); look at nvidia-smi"
    return [Finding("GPU", "absent", f"runs use the CPU; {cure}")]


def _cores() -> list[Finding]:
    import torch

    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    threads = torch.get_num_threads()
    text = f"{usable} of {total} usable, torch uses {threads} threads"
    if threads > usable:
        return [Finding("cores", "absent", f"{text}: too many; set OMP_NUM_THREADS={usable}")]
    return [Finding("cores", "ok", text)]
