"""Devices and processes: the mesh, which device holds which part of an array, and what several processes tell each other."""
