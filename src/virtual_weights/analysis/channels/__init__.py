"""Questions about one virtual weight: its gains, its directions in tokens, its rotary offsets."""
