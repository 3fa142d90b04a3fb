"""Readers of a run's events: the progress bar, and programs that draw curves."""
