"""The methods by name: METHODS[recipe.method.name] is the class whose options a recipe gives."""

from .ce import CE
from .crd import CRD
from .dkd import DKD
from .kd import KD
from .method import Method, Networks, Outputs, Role, Terms
from .mse import MSE
from .nkd import NKD
from .ofd import OFD
from .reviewkd import ReviewKD
from .simkd import SimKD
from .slkd import SLKD
from .tf_nkd import TfNKD
from .uskd import USKD

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "tf_nkd": TfNKD,
    "uskd": USKD,
    "slkd": SLKD,
    "simkd": SimKD,
    "mse": MSE,
    "crd": CRD,
    "ofd": OFD,
    "reviewkd": ReviewKD,
}

__all__ = ["METHODS", "Method", "Networks", "Outputs", "Role", "Terms"]
