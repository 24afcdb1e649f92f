"""What `itm_fast.models` offers."""

# ruff: noqa: F401

from ._attend import attention
from ._building import build, model_class, scorer
from ._common import Matcher
from ._load import Loaded, load
from .bfan import BFAN
from .chan import CHAN
from .cmcan import CMCAN
from .dual_encoder import DualEncoder
from .hgan import HGAN
from .imram import IMRAM
from .maxsim import MaxSim
from .naaf import NAAF
from .rcar import RCAR
from .scan import SCAN
from .sgraf import SGRAF
from .shan import SHAN
from .tshsr import TSHSR
