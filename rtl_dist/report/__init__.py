"""Plots and pages drawn from a run's files and from an evaluation's predictions."""
