"""Every sample scored once, and exact figures from the scores."""
