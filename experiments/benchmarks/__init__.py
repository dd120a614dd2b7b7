"""Measurements, each a script that writes a table and a JSON file."""
