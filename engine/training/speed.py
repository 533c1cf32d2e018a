"""What run.speed comes to: the settings of the numerics that a recipe leaves open, by device."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from ..recipe.load import AnyRecipe, Recipe
from ..recipe.run import LEFT_OPEN, Run

Which = TypeVar("Which", bound=AnyRecipe)

EXACT: dict[str, Any] = {"amp": "off", "tf32": False, "compile": False, "deterministic": True}
# Of oneDNN's own limits those that leave it instructions for bfloat16.
WIDE = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT")


def settled(recipe: Which, device: torch.device, begun: Run | None = None) -> Which:
    """The recipe with every setting of its numerics: its own, else as the run was begun, else what
    `run.speed` comes to on the device."""
    run = recipe.run
    preset = EXACT if run.speed == "exact" else fast(device, compiles=isinstance(recipe, Recipe))
    if begun is not None and begun.speed == run.speed:
        was = {name: getattr(begun, name) for name in LEFT_OPEN}
        preset = preset | {name: value for name, value in was.items() if value is not None}
    left = {name: preset[name] for name in LEFT_OPEN if getattr(run, name) is None}
    if run.compile_only is not None and left.get("compile") is False:
        raise ValueError(
            f"run.compile_only: {list(run.compile_only)}, and run.speed={run.speed} compiles "
            f"nothing on {device.type}; add run.compile=true or leave it out"
        )
    return cast(Which, recipe.model_copy(update={"run": run.model_copy(update=left)}))


def fast(device: torch.device, compiles: bool = True) -> dict[str, Any]:
    """The fast settings of a device. A CPU computes the same bytes every time all the same, and
    compiles nothing unless it is told to: whether that pays there hangs on the network."""
    if device.type == "cpu":
        return EXACT | {"amp": "bf16" if cpu_has_bf16() else "off"}
    there = torch.cuda.is_available()
    has_bf16 = not there or torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "amp": "bf16" if has_bf16 else "off",
        "tf32": True,
        "compile": compiles and find_spec("triton") is not None,
        "deterministic": False,
    }


def cpu_has_bf16() -> bool:
    """Whether convolutions have instructions for bfloat16; oneDNN, which computes them, may be
    kept from some by its own variable."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not limit.startswith(WIDE):
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
