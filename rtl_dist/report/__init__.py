"""Plots and pages: of a run from its files alone, of a model by scoring a split."""
