"""What `main.py` can do, by the config key that asks for it; without one it trains."""

from collections.abc import Callable

from yacs.config import CfgNode

from utils.distributed import Runtime

from .checking import check
from .evaluation import evaluate_only
from .measuring import info_only, throughput_only
from .planning import plan_only
from .training import train

__all__ = ["MODES", "check", "train"]

MODES: dict[str, Callable[[CfgNode, Runtime], None]] = {
    "EVAL_MODE": evaluate_only,
    "THROUGHPUT_MODE": throughput_only,
    "INFO_MODE": info_only,
    "PLAN_MODE": plan_only,
}
