"""RLSD workbook: Self-Distilled RLVR (arXiv 2604.03128) as a small change to TRL's GRPOTrainer.

Public names are looked up on first use, so that `import rlsd_lib.credit` costs torch alone and
`import rlsd_lib` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "RLSDTrainer": "rlsd_lib.trainer.trainer",
    "RLSDConfig": "rlsd_lib.trainer.config",
    "CreditViewer": "rlsd_lib.report.viewer",
    "METHODS": "rlsd_lib.methods",
    "PRESETS": "rlsd_lib.experiment.presets",
    "Experiment": "rlsd_lib.experiment.experiment",
    "Run": "rlsd_lib.runs.run",
}

__all__ = sorted(_HOME)
WORKBOOK = "Is the workbook installed? pip install -e 'PATH/TO/THE/CLONE[workbook]'"
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` when first asked for it; else AttributeError.

    Raises ImportError for a name of the workbook where the trainer alone is installed.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'rlsd_lib' has no attribute {name!r}; it exports {__all__}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"rlsd_lib.{name}: {error}. {WORKBOOK}") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
