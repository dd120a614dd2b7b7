"""The algorithms: PPO, supervised fine-tuning, DPO, reward models, and the loop around them."""
