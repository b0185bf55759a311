"""Records at rest."""
