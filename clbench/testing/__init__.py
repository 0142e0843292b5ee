"""The contract as a test suite, for clbench's own learners and scenarios and for plug-ins."""

from clbench.testing.contract import check_learner, check_scenario

__all__ = ["check_learner", "check_scenario"]
