"""The loop, schedules, memories, statistics, the journal."""
