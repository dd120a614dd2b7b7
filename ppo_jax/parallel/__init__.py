"""Devices and processes: the mesh, which device holds what of an array, and what processes tell each other."""
