"""The arithmetic of a step, without I/O."""
