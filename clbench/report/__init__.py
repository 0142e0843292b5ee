"""Records in; tables, figures and the page out. Imports no torch."""

from clbench.report.table import report

__all__ = ["report"]
