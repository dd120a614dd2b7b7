"""A run's outputs for people and other runs: its directory, configuration, records and screen."""
