"""The table of losses: tests, benchmarks and recipes reach every op through it."""

from . import backends, dkd, kd, nkd, slkd, split, tf_nkd, triton_lang, triton_ops, uskd
from .op import COMPILED, TRITON, Op, register, register_scale

OPS: dict[str, Op] = {op.name: op for op in (kd.OP, dkd.OP, nkd.OP, tf_nkd.OP, uskd.OP, slkd.OP)}

if backends.compiled()[0] is not None:
    for _op in OPS.values():
        register(_op, COMPILED)
    register_scale()
    for _name in split.LOSSES:
        split.register(_name)
if not triton_lang.MISSING:
    for _op in OPS.values():
        triton_ops.define(_op)
        register(_op, TRITON)
