"""Where rewards come from, behind one protocol (`base`)."""
