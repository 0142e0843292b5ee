"""Continual pre-training: plans, mixtures, ledgers, averages, scaling laws."""
