"""Heads, MLPs and embeddings as maps on the stream: the ingredients of every question."""
