"""Where shards are, and how their bytes come."""
