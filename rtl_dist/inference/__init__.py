"""What was trained, used: images of any origin to probabilities, by command or from Python."""
