"""The network: building, loading weights, its parts, freezing, BatchNorm statistics."""
