"""What a person makes of a run: a page with curves, samples and a verdict."""
