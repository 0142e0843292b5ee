"""The record of a run: its form, how it is stored, migrated and verified."""
