"""Where rewards come from: models, servers and functions of the user's, all of them made one `Reward` (`base`)."""
