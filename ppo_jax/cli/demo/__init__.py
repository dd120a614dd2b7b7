"""`ppo-jax demo`: a small complete RLHF of a toy language."""
