"""Records in; tables, figures and the page out. Imports no torch."""

from clbench.report.folder import report

__all__ = ["report"]
