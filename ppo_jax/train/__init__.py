"""The algorithms: PPO, supervised fine-tuning, reward models, and the loop around them."""
