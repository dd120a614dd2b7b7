"""`ppo-jax llamafactory`: a training file of LLaMA-Factory, translated and run."""
