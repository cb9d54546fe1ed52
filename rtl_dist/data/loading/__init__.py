"""Microbatches, made by worker processes and brought to the device."""
