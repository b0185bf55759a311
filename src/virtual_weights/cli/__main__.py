"""``python -m virtual_weights.cli``."""

from virtual_weights.cli.app import main

main()
