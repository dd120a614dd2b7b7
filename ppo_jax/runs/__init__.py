"""One run in one directory: its stages, what they leave behind, and how they go on after a stop."""
