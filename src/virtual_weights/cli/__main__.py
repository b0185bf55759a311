"""``python -m virtual_weights.cli``."""

from virtual_weights.cli import main

main()
