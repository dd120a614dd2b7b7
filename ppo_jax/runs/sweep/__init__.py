"""Sweeps: many runs over ranges of their settings, members of populations, and one study that many slices share."""
