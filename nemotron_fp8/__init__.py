"""Convert huge Hugging Face checkpoints to FP8: streaming, exact, in bounded memory.

Heavy modules are imported on first use: ``import nemotron_fp8`` does not import torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from nemotron_fp8._version import __version__

if TYPE_CHECKING:
    from nemotron_fp8.api import convert_repo, dequantize_repo, inspect_repo, plan_repo, quantize_repo
    from nemotron_fp8.calibration.calibrate import calibrate_repo
    from nemotron_fp8.conversion.report import Report
    from nemotron_fp8.destinations.status import Status
    from nemotron_fp8.errors import NemotronFp8Error
    from nemotron_fp8.evaluation.evaluate import evaluate_repo
    from nemotron_fp8.evaluation.result import Evaluation
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.report.reports import ResultComparison, ResultReport, compare_repos, report_repo
    from nemotron_fp8.report.summary import ResultSummary
    from nemotron_fp8.sources.inspection import Inspection
    from nemotron_fp8.status import status_of
    from nemotron_fp8.verification.verify import Verification, verify_repo

# torch warns once, when it is imported, if there is no NumPy. This package needs none.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

_HOMES = {
    "Amaxes": "planning.amaxes",
    "Evaluation": "evaluation.result",
    "HubOptions": "hub.options",
    "Inspection": "sources.inspection",
    "NemotronFp8Error": "errors",
    "Plan": "planning.plan",
    "Progress": "progress",
    "Recipe": "planning.recipe",
    "Report": "conversion.report",
    "ResultComparison": "report.reports",
    "ResultReport": "report.reports",
    "ResultSummary": "report.summary",
    "Status": "destinations.status",
    "Verification": "verification.verify",
    "calibrate_repo": "calibration.calibrate",
    "compare_repos": "report.reports",
    "convert_repo": "api",
    "dequantize_repo": "api",
    "evaluate_repo": "evaluation.evaluate",
    "inspect_repo": "api",
    "plan_repo": "api",
    "quantize_repo": "api",
    "report_repo": "report.reports",
    "status_of": "status",
    "verify_repo": "verification.verify",
}

__all__ = [
    "Amaxes",
    "Evaluation",
    "HubOptions",
    "Inspection",
    "NemotronFp8Error",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "ResultComparison",
    "ResultReport",
    "ResultSummary",
    "Status",
    "Verification",
    "__version__",
    "calibrate_repo",
    "compare_repos",
    "convert_repo",
    "dequantize_repo",
    "evaluate_repo",
    "inspect_repo",
    "plan_repo",
    "quantize_repo",
    "report_repo",
    "status_of",
    "verify_repo",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
