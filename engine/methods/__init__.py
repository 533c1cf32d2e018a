"""The methods by name: METHODS[recipe.method.name] is the class whose options a recipe gives."""

from .at import AT
from .ce import CE
from .crd import CRD
from .ctkd import CTKD
from .dgkd import DGKD
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .fitnet import FitNet
from .jointrd import JointRD, JointRDJoint, JointRDReleased
from .kd import KD
from .kdsvd import KDSVD
from .method import Method, Networks, Now, Outputs, Role, Terms
from .mse import MSE
from .nkd import NKD
from .nst import NST
from .ofd import OFD
from .pkt import PKT
from .reviewkd import ReviewKD
from .rkd import RKD
from .simkd import SimKD
from .slkd import SLKD
from .slkd_sequential import SequentialSLKD
from .sp import SP
from .tf_nkd import TfNKD
from .uskd import USKD
from .vid import VID
from .wsld import WSLD
from .wttm import WTTM

METHODS: dict[str, type[Method]] = {
    # Logits.
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "wttm": WTTM,
    "tf_nkd": TfNKD,
    "uskd": USKD,
    "slkd": SLKD,
    "slkd_sequential": SequentialSLKD,
    "dist": DIST,
    "wsld": WSLD,
    "ctkd": CTKD,
    "dgkd": DGKD,
    "dml": DML,
    # Features.
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "rkd": RKD,
    "pkt": PKT,
    "nst": NST,
    "vid": VID,
    "kdsvd": KDSVD,
    "crd": CRD,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "mse": MSE,
    # Parts of the teacher are reused.
    "simkd": SimKD,
    "jointrd": JointRD,
    "jointrd_joint": JointRDJoint,
    "jointrd_ta_released": JointRDReleased,
}

__all__ = ["METHODS", "Method", "Networks", "Now", "Outputs", "Role", "Terms"]
