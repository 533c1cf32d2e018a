"""The methods by name: METHODS[recipe.method.name] is the class whose options a recipe gives."""

from .ce import CE
from .ctkd import CTKD
from .dgkd import DGKD
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .kd import KD
from .method import Method, Networks, Outputs, Role, Terms
from .nkd import NKD
from .simkd import SimKD
from .slkd import SLKD
from .slkd_sequential import SequentialSLKD
from .tf_nkd import TfNKD
from .uskd import USKD
from .wsld import WSLD

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "tf_nkd": TfNKD,
    "uskd": USKD,
    "slkd": SLKD,
    "slkd_sequential": SequentialSLKD,
    "dist": DIST,
    "wsld": WSLD,
    "ctkd": CTKD,
    "dgkd": DGKD,
    "dml": DML,
    "simkd": SimKD,
}

__all__ = ["METHODS", "Method", "Networks", "Outputs", "Role", "Terms"]
