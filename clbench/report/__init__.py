"""Records in, tables out. Imports no torch."""

from clbench.report.table import report
from clbench.report.verify import verify

__all__ = ["report", "verify"]
