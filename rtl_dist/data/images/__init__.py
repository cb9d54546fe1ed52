"""Image bytes to what the network sees."""
