"""Questions about the stream as a whole: what is written and read at each state, and in which basis."""
