"""Questions about memory management: which neurons and heads erase what is in the stream."""
