"""Which sample comes at which position of the training stream."""
