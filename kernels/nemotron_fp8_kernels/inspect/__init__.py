"""Report of the compiled kernels, without a GPU: ``python -m nemotron_fp8_kernels.inspect --arch 90 --json``.

Each kernel is compiled in its production configurations, for aligned tensors and for ragged ones. The report is read
from the PTX and the machine code: spills, vector widths, programs per SM, instructions, bytes in flight. A model of the
device turns these into a predicted share of the memory roof. Nothing is measured.
"""

from .model import Prediction
from .report import Report, compile_spec, report_all, widest
from .spec import INPUTS, Spec, specs

__all__ = ["INPUTS", "Prediction", "Report", "Spec", "compile_spec", "report_all", "specs", "widest"]
