"""Several `ppo-jax` commands in one process: `python -m tests.command_worker JSON`, a list of lists of words."""

import json
import sys

from ppo_jax.cli import main as cli

if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        if code := cli.main(words):
            sys.exit(code)
