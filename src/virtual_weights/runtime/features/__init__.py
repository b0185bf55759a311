"""Questions about features of attached dictionaries on text: whether they are read where they say, and what flows."""
