"""Questions about blocks in sequence, each linear at an operating point."""
