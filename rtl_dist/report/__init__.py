"""Plots and pages: of a run from its files alone, of an evaluation from its scores."""
