"""Other trainers on the same work: workers that run in environments of their own, without ppo_jax."""
