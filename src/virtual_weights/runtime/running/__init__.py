"""A model, the tokens it runs on, and what its modules receive and give."""
