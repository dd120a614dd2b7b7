"""`ppo-jax generate`: responses of a model, or of a policy that was trained on it; and prompts -> token rows."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ppo_jax.cli.parse import Brief
from ppo_jax.data import PromptRecord, TooLong, left_pad, read_prompts
from ppo_jax.data.chat import use_date
from ppo_jax.data.disk import publish
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.heads import ValueHead
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.parallel import processes
from ppo_jax.parallel.mesh import MeshConfig, use_mesh
from ppo_jax.rollout import Sampling, generate
from ppo_jax.runs import trained
from ppo_jax.runs.prompts import PromptSet, check_room, describe_unknown, encode_prompt_set
from ppo_jax.runs.setup import decode_responses, missing_stop, with_stops
from ppo_jax.train.state import key_stream
from ppo_jax.types import Policy, Prompts


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """Sample responses to prompts, from a model or from a policy that was trained on it."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The policy of this run (of `ppo-jax ppo`, `sft` or `dpo`, or the adapter in it) answers; without one the model
    itself does."""
    policy: Path | None = None
    """This option names the run too, in place of the first argument."""
    step: int | None = None
    """The checkpoint of this update of the run answers; by default the newest does."""
    model: str | None = None
    """The model is this Hugging Face directory, name on the hub, or .gguf file; by default it is the base that the run
    names."""
    prompt: tuple[str, ...] = ()
    """These texts are the prompts to be answered."""
    chat: bool = False
    """Give each --prompt as a user's message, in the tokenizer's chat template. Prompts of a file say it themselves."""
    prompts: Path | None = None
    """This file holds prompts, as for `ppo-jax ppo`."""
    output: Path | None = None
    """Write JSON lines {"prompt", "response", "finished"} to this new file, instead of text to the terminal. Until all
    are there, the file has `.partial` after its name."""
    date: str = ""
    """This day, as 2026-11-28, is the date that chat templates write; by default it is today."""
    seed: int = 0
    """This number seeds the sampling of responses."""
    temperature: float = 0.7
    """Sampling divides the logits by this temperature; 0 takes the most probable token."""
    sampling: Sampling = Sampling(response_length=64)
    """These options say how tokens are chosen. stop_ids add to those of model and tokenizer; pad_id is always
    theirs."""
    batch_size: int = 16
    """This many prompts are answered at once."""
    max_prompt: int = 1024
    """A prompt may have at most this many tokens."""
    too_long: TooLong = "error"
    """A prompt longer than allowed is an error, is truncated from the left, or is dropped."""
    chat_template: Path | None = None
    """This file's chat template (Jinja) takes the place of the tokenizer's own."""
    compute: ModelOptions = ModelOptions()
    """These options trade memory against speed when the model is run."""
    mesh: MeshConfig = MeshConfig()
    """These options say how many devices of this machine share the work; by default it is one."""


BRIEF = Brief(
    (
        "ppo-jax generate runs/ppo --prompt 'The film was'",
        "ppo-jax generate --model MODEL --prompts prompts.jsonl --output responses.jsonl --temperature 0",
        "ppo-jax generate runs/sft --chat --prompt 'What is PPO?' --sampling.response-length 99 --sampling.top-p 0.9",
    ),
    {
        GenerateSettings: (
            *("run", "step", "model", "prompt", "chat", "prompts", "output", "seed", "temperature", "batch_size"),
            *("max_prompt", "too_long", "sampling", "compute"),
        ),
        ModelOptions: ("dtype",),
        Sampling: ("response_length", "top_k", "top_p"),
    },
)


def generate_responses(settings: GenerateSettings) -> None:
    """Run `ppo-jax generate`."""
    if settings.temperature < 0:
        raise ValueError(f"--temperature {settings.temperature} must not be negative")
    if settings.run and settings.policy:
        raise ValueError(f"RUN {settings.run} and --policy {settings.policy} are one option; give one of them")
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size {settings.batch_size} must be at least 1")
    if not (settings.prompt or settings.prompts):
        raise ValueError("nothing to answer: give --prompt TEXT or --prompts FILE")
    if settings.chat and not settings.prompt:
        raise ValueError(
            f"--chat is for --prompt TEXT and changes nothing in --prompts {settings.prompts}: leave it out, and write "
            'messages there as "prompt": [{"role": "user", "content": TEXT}]'
        )
    if settings.output:
        check_output(settings.output)
    with use_mesh(settings.mesh), use_date(settings.date):
        _generate(settings)


def _generate(settings: GenerateSettings) -> None:
    model, policy = _policy(settings)
    sampling = with_stops(settings.sampling, model)
    if notice := missing_stop(sampling, model):
        warnings.warn(notice, stacklevel=2)
    texts = [[{"role": "user", "content": text}] if settings.chat else text for text in settings.prompt]
    records = [PromptRecord(text, {}, f"--prompt {number}") for number, text in enumerate(texts, start=1)]
    records += read_prompts(settings.prompts) if settings.prompts else []
    prompts, _ = encode_prompt_set(records, model, settings.max_prompt, settings.too_long)
    check_room(model, prompts.rows, sampling.response_length)
    if unknown := describe_unknown(model, prompts.rows):
        warnings.warn(unknown, stacklevel=2)
    found = responses(model, policy, prompts, sampling, settings)
    if settings.output:
        print(f"{write(found, settings.output)} responses are in {settings.output}")
        return
    for response in found:
        print(f"{response.prompt}\n>>> {response.response}\n", flush=True)


class Response(NamedTuple):
    """One answer."""

    prompt: str
    response: str
    finished: bool  # ended by itself; False: cut by length


def check_output(output: Path) -> None:
    """Raise OSError unless a new file can be made at `output`; nothing is replaced, nor what is left of a kill."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no directory {output.parent}; make it first")
    if output.exists():
        raise FileExistsError(f"{output} already exists; choose another --output")
    if _partial(output).exists():
        raise FileExistsError(
            f"{_partial(output)} holds the responses of a command that did not end; move it, or choose another --output"
        )


def write(found: Iterable[Response], output: Path) -> int:
    """Write responses as JSON lines, each when it comes, and return how many.

    They go into a file beside `output` that gets its name at the end: what stops early leaves those that were finished.
    """
    count = 0
    with _partial(output).open("x", encoding="utf-8") as file:
        try:
            for response in found:
                file.write(json.dumps(response._asdict(), ensure_ascii=False) + "\n")
                file.flush()
                count += 1
        except BaseException:
            if not count:  # nothing that is worth keeping stands in the way of the next command
                _partial(output).unlink()
            raise
    publish(_partial(output), output)
    return count


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def responses(
    model: Model, policy: Policy, prompts: PromptSet, sampling: Sampling, settings: GenerateSettings
) -> Iterator[Response]:
    """Sample one response per prompt, `settings.batch_size` at a time; one program serves all batches."""
    run, policy = jax.jit(partial(generate, config=model.config, sampling=sampling)), place_on_mesh(policy)
    key, count = key_stream(settings.seed, "generate"), len(prompts.rows)
    size = min(settings.batch_size, count)
    tokens, mask = left_pad(prompts.rows, max(map(len, prompts.rows)), model.pad_id)
    for number, start in enumerate(range(0, count, size)):
        index = np.minimum(np.arange(start, start + size), count - 1)  # the last batch is filled up
        batch = processes.feed(Prompts(tokens[index], mask[index], index))  # type: ignore[arg-type]  # numpy till here
        batch_key = jax.random.fold_in(key, number)
        rollout = run(model.params, policy, prompts=batch, key=batch_key, temperature=settings.temperature)
        texts, finished = decode_responses(model, sampling, rollout), np.asarray(rollout.terminated)
        for row in range(min(size, count - start)):
            yield Response(prompts.texts[start + row], texts[row], bool(finished[row]))


def _policy(settings: GenerateSettings) -> tuple[Model, Policy]:
    """Load the model and the role that answers."""
    run = settings.run or settings.policy
    if run is None:
        if settings.step is not None:
            raise ValueError("--step chooses an update of a run; give RUN too")
        if settings.model is None:
            raise ValueError("nobody to answer: give a run, --model, or both")
        return (model := load_model(settings.model, settings.compute, settings.chat_template)), Policy(
            {}, _no_values(model)
        )
    found = trained.find(run, settings.step, settings.model, settings.compute, settings.chat_template)
    return found.model, Policy(found.adapter, found.head or _no_values(found.model))


def _no_values(model: Model) -> Any:
    return ValueHead().init(jax.random.key(0), jnp.zeros((1, model.config.hidden_size)))["params"]
