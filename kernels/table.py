"""The table of losses: tests, benchmarks and recipes reach every op through it."""

from collections.abc import Callable

from . import backends, dkd, kd, nkd, slkd, tf_nkd, uskd, wttm
from .namespace import COMPILED, TRITON
from .op import Loss, Op, register, register_scale
from .sharded import call as sharded
from .triton import lang as triton_lang
from .triton import ops as triton_ops

_MODULES = (kd, dkd, nkd, wttm, tf_nkd, uskd, slkd)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
# The public functions.
LOSSES: dict[str, Callable[..., Loss]] = {
    module.OP.name: getattr(module, f"{module.OP.name}_loss") for module in _MODULES
}

if backends.compiled()[0] is not None:
    for _op in OPS.values():
        register(_op, COMPILED)
    register_scale()
    for _op in filter(lambda op: op.from_stats, OPS.values()):
        sharded.register(_op)
if not triton_lang.MISSING:
    for _op in OPS.values():
        triton_ops.define(_op)
        register(_op, TRITON)
