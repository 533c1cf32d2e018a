"""The methods by name: METHODS[recipe.method.name] is the class whose options a recipe gives."""

from .at import AT
from .ce import CE
from .dkd import DKD
from .fitnet import FitNet
from .kd import KD
from .kdsvd import KDSVD
from .method import Method, Networks, Outputs, Role, Terms
from .nkd import NKD
from .nst import NST
from .pkt import PKT
from .rkd import RKD
from .simkd import SimKD
from .slkd import SLKD
from .sp import SP
from .tf_nkd import TfNKD
from .uskd import USKD
from .vid import VID

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "tf_nkd": TfNKD,
    "uskd": USKD,
    "slkd": SLKD,
    "simkd": SimKD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "rkd": RKD,
    "pkt": PKT,
    "nst": NST,
    "vid": VID,
    "kdsvd": KDSVD,
}

__all__ = ["METHODS", "Method", "Networks", "Outputs", "Role", "Terms"]
