"""Questions about single edges of a running model: removal, and its first order."""
