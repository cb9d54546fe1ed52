"""What frozen parts make of every image, computed once a view and found again on disk."""
