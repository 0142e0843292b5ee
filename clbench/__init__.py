"""clbench: continual learning measured so that it can be trusted. Importing it loads no torch."""

from clbench.interfaces import (
    Batch,
    Budget,
    BudgetExceeded,
    Capabilities,
    Data,
    Experience,
    Learner,
    Place,
    Schedule,
    UserError,
)

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Budget",
    "BudgetExceeded",
    "Capabilities",
    "Data",
    "Experience",
    "Learner",
    "Place",
    "Schedule",
    "UserError",
]
