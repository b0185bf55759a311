"""Questions about what becomes of what was written: erased, persisting, worth erasing."""
