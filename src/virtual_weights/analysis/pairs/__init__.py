"""Questions about every pair of a writer and a reader."""
