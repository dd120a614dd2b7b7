"""`python -m ppo_jax.cli`: the console command."""

import sys

from ppo_jax.cli.main import main

sys.exit(main())
