"""The table of losses: tests, benchmarks and recipes reach every op through it."""

from . import backends, dkd, kd, nkd, slkd, tf_nkd, uskd
from .op import COMPILED, TRITON, Op, register, register_scale
from .sharded import call as sharded
from .triton import lang as triton_lang
from .triton import ops as triton_ops

OPS: dict[str, Op] = {op.name: op for op in (kd.OP, dkd.OP, nkd.OP, tf_nkd.OP, uskd.OP, slkd.OP)}

if backends.compiled()[0] is not None:
    for _op in OPS.values():
        register(_op, COMPILED)
    register_scale()
    for _name in sharded.LOSSES:
        sharded.register(_name)
if not triton_lang.MISSING:
    for _op in OPS.values():
        triton_ops.define(_op)
        register(_op, TRITON)
