"""Making and checking data sets: pack, index, verify."""
