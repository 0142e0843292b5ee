"""Evaluators (a learner's answers to named sums), metrics (sums to numbers) and the formulas of peer libraries."""
