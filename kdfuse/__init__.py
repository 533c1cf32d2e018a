"""kdfuse: fused knowledge-distillation losses and the engine that trains with them."""

from .kernels.backends import backends
from .kernels.dkd import DKDLoss, dkd_loss
from .kernels.kd import KDLoss, kd_loss
from .kernels.nkd import NKDLoss, nkd_loss
from .kernels.parts import ClassPart
from .kernels.slkd import SLKDLoss, slkd_loss
from .kernels.sparse import SparseTeacher
from .kernels.table import OPS
from .kernels.tf_nkd import TfNKDLoss, tf_nkd_loss
from .kernels.uskd import USKDLoss, uskd_loss
from .kernels.wttm import WTTMLoss, wttm_loss

__version__ = "0.1.0"

__all__ = [
    "ClassPart",
    "DKDLoss",
    "KDLoss",
    "NKDLoss",
    "OPS",
    "SLKDLoss",
    "SparseTeacher",
    "TfNKDLoss",
    "USKDLoss",
    "WTTMLoss",
    "backends",
    "dkd_loss",
    "kd_loss",
    "nkd_loss",
    "slkd_loss",
    "tf_nkd_loss",
    "uskd_loss",
    "wttm_loss",
]
