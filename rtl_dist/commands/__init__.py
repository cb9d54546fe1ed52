"""One file a command: its arguments, and one call."""
