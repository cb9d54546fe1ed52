"""Proof by killing: what a run is worth that was killed at random moments."""
