"""Pure arithmetic: arrays in, arrays out. One idea per module, one formula per function."""
