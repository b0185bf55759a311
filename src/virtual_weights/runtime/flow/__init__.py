"""Questions about what flows: averages over text, behaviour of heads, one prompt taken apart."""
