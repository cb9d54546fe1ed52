"""A data set, read: which sample comes when, its bytes, its pixels, its microbatch."""
