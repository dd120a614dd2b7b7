"""Devices and processes: the mesh, how arrays lie on it, and what several processes tell each other."""
