"""The planner: PPO's programs compiled for devices that are not there, and what they would need of them."""
