"""Operators: functions from stream to stream, for any data set. `scenario.operators=[permute]` chains them left to right.

An operator takes a `Scenario` and options with defaults and returns another `Scenario`; it draws with a counter-based key of
its own, and what it did stands in the manifest, so in its hash. One from elsewhere is named by its dotted path
(`scenario.operators=[my_module.my_operator]`) or by an entry point of its package in the group `clbench.operators`.
"""
