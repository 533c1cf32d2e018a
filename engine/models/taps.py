"""Features of a network while it runs: named points, and taps that keep what passes there.

Feature maps are (N, C, H, W), whatever their layout in memory, tokens (N, L, C).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import ResNet

INPUT = ":in"  # behind a module's path: what goes in, not what comes out


def points(model: nn.Module) -> dict[str, str]:
    """The named points of a network, shallow to deep: name to module path.

    Names are "stem", "stage1" to "stageN" (after the last ReLU of each), the same with ".pre"
    (before that ReLU), "pooled", and "classifier", the last linear layer. A path with ":in" is the
    module's input. Empty for a network that states none: its taps are module paths.
    """
    from torchvision.models import ResNet  # seconds, needed late

    if isinstance(model, ResNet):
        return _torchvision_resnet(model)
    info = getattr(model, "feature_info", None)
    if isinstance(info, list):
        return _timm(model, info)
    return dict(getattr(model, "taps", {}))


def shapes(model: nn.Module, names: Sequence[str], size: int) -> dict[str, torch.Size]:
    """The shape of each point for one image of `size` x `size`, found by a forward pass.

    The model is left as it was. Raises ValueError as `Taps` does.
    """
    if not names:
        return {}
    first = next(model.parameters())
    training = model.training
    taps = Taps(model, names)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype))
        return {name: value.shape for name, value in taps.take().items()}
    finally:
        taps.remove()
        model.train(training)


def unreached(model: nn.Module, names: Sequence[str], size: int) -> list[nn.Parameter]:
    """The parameters that no point of `names` depends on, those behind the last one.

    The model is left as it was. Raises ValueError as `Taps` does.
    """
    training = model.training
    taps = Taps(model, names)
    try:
        first = next(model.parameters())
        with torch.enable_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype))
            total = torch.stack([value.sum() for value in taps.take().values()]).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, g in zip(parameters, found, strict=True) if g is None]
    finally:
        taps.remove()
        model.train(training)


class Taps:
    """Keeps what passes at some points of a network in each forward pass; nothing runs twice.

    A point is a name of `points(model)` or a module path, with ":in" for the module's input. Of a
    module that is called several times, the last call is kept. Make it before the model is
    compiled or folded; state dicts do not change. Raises ValueError for a point that is not there.
    """

    # A tapped module gets a subclass of its class, as in torch.nn.utils.parametrize, and no hook:
    # torch.compile does not look at hooks when it decides whether a network of the same class can
    # use a graph it already has, and would drop the tap.
    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        known = points(model)
        paths = {name: known.get(name, name) for name in names}
        for name, path in paths.items():
            _check(model, known, name, path)
        # They would overwrite what a tap before them keeps.
        self._inplace = [m for m in model.modules() if names and getattr(m, "inplace", False)]
        for module in self._inplace:
            vars(module)["inplace"] = False
        wanted = dict.fromkeys(paths.values())
        self._own = [path for path in wanted if path not in _keeps(model)]
        for path in self._own:
            _insert(model.get_submodule(path.removesuffix(INPUT)), path)
        self._paths = paths
        self._keeps = _keeps(model)

    def moved(self, copy: nn.Module) -> Taps:
        """The same taps in a copy of the model that was made with them, such as a folded one."""
        other = object.__new__(Taps)
        other._model, other._paths, other._keeps = copy, self._paths, _keeps(copy)
        other._own, other._inplace = self._own, []
        return other

    def take(self) -> dict[str, Tensor]:
        """What passed at each point in the last forward pass, with its gradient, by name.

        It is handed over once, so that no graph outlives its step; RuntimeError the second time,
        and when something wrote over a kept tensor.
        """
        kept = {path: self._keeps[path].hand_over() for path in set(self._paths.values())}
        return {name: kept[path] for name, path in self._paths.items()}

    def remove(self) -> None:
        """Take out of the model again what these taps put in."""
        for path in self._own:
            module = self._model.get_submodule(path.removesuffix(INPUT))
            del module._modules[_place(path)]
            if not any(isinstance(inner, Keep) for inner in module.children()):
                module.__class__ = type(module).__mro__[2]
        for module in self._inplace:
            vars(module)["inplace"] = True


class Until(nn.Module):
    """A network as a module that gives what passes at one point instead of the logits."""

    def __init__(self, network: nn.Module, point: str) -> None:
        super().__init__()
        self.network = network
        self.point = point
        self._taps = Taps(network, [point])

    def forward(self, images: Tensor) -> Tensor:
        self.network(images)
        return self._taps.take()[self.point]


class Keep(nn.Module):
    """Passes its input through and remembers it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.value: Tensor | None = None
        self.version = 0

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        if not torch.compiler.is_compiling():
            self.version = x._version
        return x

    def hand_over(self) -> Tensor:
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError(f"tap {self.path}: no forward pass since the last take()")
        if not torch.compiler.is_compiling() and value._version > self.version:
            raise RuntimeError(
                f"tap {self.path}: the network overwrites this tensor in place; tap the module "
                "before or behind it"
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model: no value, since a tensor inside a graph cannot be copied."""
        return super().__getstate__() | {"value": None}


class _Tapped(nn.Module):
    """Mixed into the class of a tapped module."""


@cache
def _tapped(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, after = self._modules.get("tap_in"), self._modules.get("tap_out")
        if before is not None:
            args = (before(args[0]), *args[1:])
        if base is nn.Sequential:  # its own forward would run the taps as layers
            (out,) = args
            for module in self._modules.values():
                if not isinstance(module, Keep):
                    assert module is not None
                    out = module(out)
        else:
            out = base.forward(self, *args, **kwargs)
        return out if after is None else after(out)

    # torch.fx takes modules of torch.nn as one call, by the name of their module.
    own = {"forward": forward, "__module__": base.__module__}
    return type(f"Tapped{base.__name__}", (_Tapped, base), own)


def _insert(module: nn.Module, path: str) -> None:
    if not isinstance(module, _Tapped):
        kind: Any = type(module)
        module.__class__ = _tapped(kind)
    if _place(path) in module._modules:
        raise ValueError(
            f"tap {path!r}: the network reads that point itself; tap the module before or behind it"
        )
    module.add_module(_place(path), Keep(path))


def _place(path: str) -> str:
    return "tap_in" if path.endswith(INPUT) else "tap_out"


def _keeps(model: nn.Module) -> dict[str, Keep]:
    return {module.path: module for module in model.modules() if isinstance(module, Keep)}


def _check(model: nn.Module, known: dict[str, str], name: str, path: str) -> None:
    paths = [p for p, _ in model.named_modules() if p]
    if path.removesuffix(INPUT) in paths:
        return
    near = difflib.get_close_matches(name, [*known, *paths], n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    own = f"its points are {', '.join(known)}; " if known else "it names no points of its own; "
    raise ValueError(
        f"tap {name!r}: no such point of {type(model).__name__}; {hint}{own}any path of a module "
        "is one, with :in for its input"
    )


def _timm(model: nn.Module, info: list[dict[str, Any]]) -> dict[str, str]:
    """Its list of features: the stages are those from 1/4 of the image's side on.

    Networks whose maps are (N, H, W, C) name none: methods read (N, C, H, W).
    """
    if getattr(model, "output_fmt", "NCHW") != "NCHW":
        return {}
    known = [entry for entry in info if entry["reduction"] >= 4]
    return {f"stage{i}": entry["module"] for i, entry in enumerate(known, start=1)}


def _torchvision_resnet(model: ResNet) -> dict[str, str]:
    """A block calls its one ReLU several times; the last call ends the block."""
    found = {"stem": "relu", "stem.pre": "bn1"}
    for i, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), start=1):
        last = f"layer{i}.{len(layer) - 1}.relu"
        found |= {f"stage{i}": f"layer{i}", f"stage{i}.pre": last + INPUT}
    return found | {"pooled": "avgpool", "classifier": "fc"}
