"""What may be wrong with a checkpoint that is read, and with one that is saved."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the state it is read into."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are missing, truncated, or not those that were saved."""


class CheckpointSaveError(RuntimeError):
    """A save that failed, at once or in the background. What was saved before is untouched."""


class CheckpointSaveBroken(CheckpointSaveError):
    """One of several processes failed where the others cannot know of it: this one has to end."""
