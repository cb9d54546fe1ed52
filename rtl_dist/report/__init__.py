"""Plots and pages, drawn from the files of a run alone."""
