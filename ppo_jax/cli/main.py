"""The console command `ppo-jax`, and what becomes of an error: one line and an exit code, no traceback."""

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from ppo_jax.cli import dpo, export, generate, ppo, reward, sft
from ppo_jax.cli.parse import Brief, parse
from ppo_jax.cli.plan import programs
from ppo_jax.cli.plan.command import plan
from ppo_jax.cli.serve import settings as serving
from ppo_jax.cli.serve.command import serve_reward
from ppo_jax.parallel import launch
from ppo_jax.train.loop import Interrupted

# Exit codes. 75 is sysexits.h's EX_TEMPFAIL: stopped by SIGTERM, Ctrl-C or the cluster, saved, to be gone on with.
FAILED, MISTAKE, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
LONGEST = 4000  # characters of a message: it may quote what stands in a damaged file
TRACEBACK = "PPO_JAX_TRACEBACK"  # set it to see where an error came from


class Command(NamedTuple):
    settings: type
    run: Callable[[Any], None]
    brief: Brief


COMMANDS = {
    "sft": Command(sft.SFTSettings, sft.sft, sft.BRIEF),
    "reward": Command(reward.RewardSettings, reward.reward, reward.BRIEF),
    "ppo": Command(ppo.PPOSettings, ppo.ppo, ppo.BRIEF),
    "generate": Command(generate.GenerateSettings, generate.generate_responses, generate.BRIEF),
    "export": Command(export.ExportSettings, export.export, export.BRIEF),
    "dpo": Command(dpo.DPOSettings, dpo.dpo, dpo.BRIEF),
    "plan": Command(programs.PlanSettings, plan, programs.BRIEF),
    "export-reward": Command(reward.ExportRewardSettings, reward.export_reward, reward.BRIEF_EXPORT),
    "serve-reward": Command(serving.ServeSettings, serve_reward, serving.BRIEF),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run `ppo-jax COMMAND OPTIONS`; return the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else MISTAKE
    if args[0] == "--version":
        print(f"ppo_jax {metadata.version('ppo_jax')}")
        return 0
    name, *options = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"ppo-jax: {name!r} is not a command; {hint}", file=sys.stderr)
        return MISTAKE
    command, prog = COMMANDS[name], f"ppo-jax {name}"
    return exit_code(prog, lambda: command.run(parse(command.settings, options, prog=prog, brief=command.brief)))


def usage() -> str:
    """List the commands, from the docstrings of their settings."""
    lines = [f"  {name:<15}{(command.settings.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: ppo-jax COMMAND [OPTIONS]   (ppo-jax COMMAND --help lists the options)", "", *lines])


def exit_code(prog: str, run: Callable[[], object]) -> int:
    """Call `run`. An error that a user can act on becomes a message on standard error and an exit code.

    2: a mistake in what was given (a ValueError, or a file that is missing or in the way). 1: it failed on the way (a
    loss that is not finite, a full disk). 75: stopped as it was asked to, and saved; --resume goes on. 130: interrupted
    at once. Anything else is a bug of ours, and keeps its traceback. One of several processes that has failed ends here
    (`launch.end_process`), so that the others do not wait for it; all stop together when asked to (75).
    """
    try:
        code = _exit_code(prog, run)
    except Exception:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            launch.end_process(FAILED)
        raise
    if code not in (0, PREEMPTED):
        launch.end_process(code)
    return code


def _exit_code(prog: str, run: Callable[[], object]) -> int:
    try:
        run()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Interrupted as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return PREEMPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as error:
        print(f"{prog}: out of memory{f': {error}' if str(error) else ''}", file=sys.stderr)
        return FAILED
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        known = isinstance(error, ValueError | FileNotFoundError | FileExistsError)
        ours = known or isinstance(error, OSError | FloatingPointError) or type(error).__module__.startswith("ppo_jax")
        if not ours or os.environ.get(TRACEBACK):
            raise
        said = str(error)
        print(f"{prog}: {said if len(said) <= LONGEST else said[:LONGEST] + ' ...'}", file=sys.stderr)
        return MISTAKE if known else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
