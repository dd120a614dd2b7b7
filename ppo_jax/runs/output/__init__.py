"""What a run leaves for people and other runs: its directory, configuration, records and screen."""
