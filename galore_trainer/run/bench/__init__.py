"""``galore-ft bench``: steps, refreshes and whole training steps, against other methods in one run."""
