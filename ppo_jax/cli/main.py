"""The console command `ppo-jax`, and what becomes of an error: one line and an exit code, no traceback."""

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

from ppo_jax.cli import dpo, export, generate, ppo, report, reward, sft, sweep
from ppo_jax.cli.demo import command as demo
from ppo_jax.cli.llamafactory import command as llamafactory
from ppo_jax.cli.parse import HELP, Brief, parse
from ppo_jax.cli.plan import programs
from ppo_jax.cli.plan.command import plan
from ppo_jax.cli.serve import settings as serving
from ppo_jax.cli.serve.command import serve_reward
from ppo_jax.data import assets
from ppo_jax.data.locks import release_all
from ppo_jax.parallel import launch
from ppo_jax.parallel.programs import keep_programs
from ppo_jax.runs.output.caller import in_words_of_caller
from ppo_jax.runs.output.config import nearest
from ppo_jax.runs.output.streams import claim_streams, drop_stream, flush_streams
from ppo_jax.runs.signals import INTERRUPTED, PREEMPTED, end_when_asked
from ppo_jax.train.loop import Interrupted

# Exit codes. 75 is sysexits.h's EX_TEMPFAIL: stopped by SIGTERM, Ctrl-C or the cluster, saved, to be gone on with.
FAILED, MISTAKE = 1, 2
LONGEST = 4000  # characters of a message: it may quote what stands in a damaged file
TRACEBACK = "PPO_JAX_TRACEBACK"  # set it to see where an error came from


class Command(NamedTuple):
    settings: type
    run: Callable[[Any], object]
    brief: Brief


def _sweep(name: str, stage: Any, settings: type, *examples: str) -> Command:
    """Make the command `ppo-jax sweep NAME`."""
    shown = tuple(f"ppo-jax sweep {name} {example}" for example in examples)
    made, brief = sweep.make_settings(settings, stage.BRIEF, f"runs/sweep-{name}", shown)
    return Command(made, lambda given: sweep.sweep(given, stage.sweep_task), brief)


STAGES: dict[str, llamafactory.Stage] = {
    "sft": (sft.SFTSettings, sft.sft),
    "reward": (reward.RewardSettings, reward.reward),
    "dpo": (dpo.DPOSettings, dpo.dpo),
    "ppo": (ppo.PPOSettings, ppo.ppo),
}
COMMANDS = {
    "demo": Command(demo.DemoSettings, demo.demo, demo.BRIEF),
    "sft": Command(sft.SFTSettings, sft.sft, sft.BRIEF),
    "reward": Command(reward.RewardSettings, reward.reward, reward.BRIEF),
    "ppo": Command(ppo.PPOSettings, ppo.ppo, ppo.BRIEF),
    "generate": Command(generate.GenerateSettings, generate.generate_responses, generate.BRIEF),
    "report": Command(report.ReportSettings, report.report, report.BRIEF),
    "export": Command(export.ExportSettings, export.export, export.BRIEF),
    "dpo": Command(dpo.DPOSettings, dpo.dpo, dpo.BRIEF),
    "llamafactory": Command(
        llamafactory.LlamaFactorySettings, lambda given: llamafactory.run_file(given, STAGES), llamafactory.BRIEF
    ),
    "plan": Command(programs.PlanSettings, plan, programs.BRIEF),
    "export-reward": Command(reward.ExportRewardSettings, reward.export_reward, reward.BRIEF_EXPORT),
    "serve-reward": Command(serving.ServeSettings, serve_reward, serving.BRIEF),
    "sweep ppo": _sweep(
        *("ppo", ppo, ppo.PPOSettings),
        '--model MODEL --prompts prompts.jsonl --reward runs/reward --ranges hyper.kl-coef "log 0.005..0.2"',
        "--config runs/ppo/config.yaml --ranges policy.rank '4 8' seed '0 1 2' --sweep.search grid --dry-run",
    ),
    "sweep sft": _sweep(
        *("sft", sft, sft.SFTSettings),
        '--model MODEL --data texts.jsonl --ranges sft.learning-rate "log 1e-5..1e-3" --sweep.objective=-heldout_loss',
    ),
    "sweep reward": _sweep(
        *("reward", reward, reward.RewardSettings),
        '--model MODEL --pairs pairs.jsonl --ranges reward.epochs "1 2" --sweep.objective heldout_accuracy',
    ),
    "sweep dpo": _sweep(
        *("dpo", dpo, dpo.DPOSettings),
        '--model MODEL --pairs pairs.jsonl --ranges dpo.beta "0.05 0.1 0.3" --sweep.objective heldout_accuracy',
    ),
    "sweep-report": Command(sweep.SweepReportSettings, sweep.report_sweep, sweep.BRIEF_REPORT),
    "compare": Command(sweep.CompareSettings, sweep.compare, sweep.BRIEF_COMPARE),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run `ppo-jax COMMAND OPTIONS`; return the exit code."""
    claim_streams()
    try:
        code = _run_command(args)
    except SystemExit as leaving:  # the options' parser has shown the help, or a mistake
        if (wrong := flush_streams()) and not leaving.code:
            raise SystemExit(report_output(wrong)) from None
        raise
    except OSError as error:  # commands turn their own into messages: here it was the list of commands
        wrong = flush_streams() or str(error)
        return 0 if isinstance(error, BrokenPipeError) else report_output(wrong)
    wrong = flush_streams()
    return report_output(wrong) if wrong and not code else code


def report_output(wrong: str) -> int:
    """Say on standard error that standard output could not be written; return the exit code of a failure."""
    print_error(f"ppo-jax: standard output cannot be written: {wrong}")
    return FAILED


def print_error(text: str) -> None:
    """Print onto standard error, where that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(in_words_of_caller(text), file=sys.stderr, flush=True)


def _run_command(args: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else MISTAKE
    if args[0] == "--version":
        print(f"ppo_jax {metadata.version('ppo_jax')}")
        return 0
    name, *options = args
    if name == "sweep":
        stages = [command.removeprefix("sweep ") for command in COMMANDS if command.startswith("sweep ")]
        if not options or options[0] not in stages:
            like = nearest(options[0], stages) if options else None
            hint = f"; did you mean {like}?" if like else ""
            print(f"ppo-jax sweep: name what is swept: {', '.join(stages)}{hint}", file=sys.stderr)
            return MISTAKE
        name, *options = f"sweep {options[0]}", *options[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"ppo-jax: {name!r} is not a command; {hint}", file=sys.stderr)
        return MISTAKE
    command, prog = COMMANDS[name], f"ppo-jax {name}"
    resumable = hasattr(command.settings, "resume") and not HELP.intersection(options)
    parsed = partial(parse, command.settings, options, prog=prog, brief=command.brief)
    return exit_code(prog, lambda: command.run(parsed()), resumable)


def usage() -> str:
    """List the commands, from the docstrings of their settings."""
    lines = [f"  {name:<15}{(command.settings.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    cache = "Compiled programs are kept in ~/.cache/ppo_jax/programs; $JAX_COMPILATION_CACHE_DIR names another place."
    lines += ["", cache]
    return "\n".join(["usage: ppo-jax COMMAND [OPTIONS]   (ppo-jax COMMAND --help lists the options)", "", *lines])


def exit_code(prog: str, run: Callable[[], object], resumable: bool = False) -> int:
    """Call `run`. An error that a user can act on becomes a message on standard error and an exit code.

    With `resumable` SIGTERM and SIGHUP end it with 75 wherever it is.

    2: a mistake in what was given (a ValueError, or a file that is missing or in the way). 1: it failed on the way (a
    loss that is not finite, a full disk). 75: stopped as it was asked to, and saved; --resume goes on. 130: interrupted
    at once. Anything else is a bug of ours, and keeps its traceback. One of several processes that has failed ends here
    (`launch.end_process`), so that the others do not wait for it; all stop together when asked to (75).
    """
    with contextlib.suppress(assets.AssetError):  # this user has no home folder
        keep_programs(assets.cache_dir())
    try:
        with end_when_asked() if resumable else contextlib.nullcontext():
            code = _exit_code(prog, run, resumable)
    except SystemExit:  # the help was shown: that it cannot be written is a failure
        resumable = False
        raise
    except Exception:
        if launch.is_one_of_more():
            traceback.print_exc()
            launch.end_process(FAILED)
        raise
    finally:
        release_all()
        if resumable:  # a run is not a failure because its words cannot be written: they are in its log
            flush_streams()
    if code not in (0, PREEMPTED):
        launch.end_process(code)
    return code


def _exit_code(prog: str, run: Callable[[], object], resumable: bool) -> int:
    try:
        run()
    except KeyboardInterrupt:
        print_error(f"{prog}: interrupted")
        return INTERRUPTED
    except Interrupted as stopped:
        print_error(f"{prog}: {stopped}")
        return PREEMPTED
    except MemoryError as error:
        print_error(f"{prog}: out of memory{f': {error}' if str(error) else ''}")
        return FAILED
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and not resumable:  # the reader, such as `head`, has seen enough
            drop_stream(sys.stdout, error)
            return 0
        if lost := launch.describe_lost_peer(error):
            print_error(f"{prog}: {lost}")
            return launch.LOST
        below = launch.is_runtime_error(error)
        if below and "RESOURCE_EXHAUSTED" in str(error) and not os.environ.get(TRACEBACK):
            print_error(
                f"{prog}: a device has no memory left ({str(error).splitlines()[0][:300]}): take less at once (the "
                "batch, accumulate, logprob-chunk, compute.remat full), or more devices; ppo-jax plan says what fits"
            )
            return FAILED
        known = isinstance(error, ValueError | FileNotFoundError | FileExistsError) and not below
        ours = known or isinstance(error, OSError | FloatingPointError) or type(error).__module__.startswith("ppo_jax")
        if not ours or os.environ.get(TRACEBACK):
            raise
        said = str(error)
        print_error(f"{prog}: {said if len(said) <= LONGEST else said[:LONGEST] + ' ...'}")
        return MISTAKE if known else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
