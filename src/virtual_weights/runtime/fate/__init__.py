"""Questions about what becomes of what was written: what is erased, what persists, and what is worth erasing."""
