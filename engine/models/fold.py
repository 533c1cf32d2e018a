"""BatchNorm folded into the convolutions before it, for networks that only infer (teachers)."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from .taps import Keep, Until

# What tracing raises for a forward that depends on values: TraceError is a ValueError.
_UNTRACEABLE = (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, NameError)


class FoldError(RuntimeError):
    """The network cannot be folded; as it is, it still works."""


class _Tracer(fx.Tracer):
    """Taps stay what they are, and so does what only they can see."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Keep | Until) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, frozen, with every BatchNorm after a convolution folded.

    Outputs are those of `model.eval()` up to rounding; `model` itself is left as it was. Taps stay,
    and what they keep too. The copy has other state-dict keys and no named points. Raises FoldError
    for a network that torch.fx cannot trace or that calls one layer from several places, where
    folding would be wrong.
    """
    name = type(model).__name__
    still = copy.deepcopy(model).eval()
    try:
        traced = fx.GraphModule(still, _Tracer().trace(still))
    except _UNTRACEABLE as error:
        raise FoldError(f"model: {name} cannot be traced by torch.fx: {error}") from error
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for target, count in calls.items():
        if count > 1 and any(True for _ in traced.get_submodule(str(target)).parameters()):
            raise FoldError(f"model: {name} calls {target} {count} times, its fold is not defined")
    folded = fuse(traced, inplace=True, no_trace=True)
    return folded.eval().requires_grad_(False)


def cast_weights(folded: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What `fold_batchnorm` made, in place, with the weights that autocast would cast at each call
    in `dtype` for good: those of convolutions and linear layers that nothing else reads. Under
    autocast the outputs stay what they were, to the bit."""
    assert isinstance(folded, fx.GraphModule)
    read = {str(node.target) for node in folded.graph.nodes if node.op == "get_attr"}
    for name, layer in folded.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in layer.named_parameters(recurse=False)}
        if type(layer) in (nn.Conv2d, nn.Linear) and not own & read:
            layer.to(dtype)
    return folded
