"""Questions about superposition: how crowded the stream is and what can be read out of it."""
