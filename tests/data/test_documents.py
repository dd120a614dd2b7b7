"""Every field of every document that is read again, missing or with a hostile value in it: what it says is used, or one
ValueError names the file and the field. Checksums are right, as of a file that was mended by hand."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.data.documents import check_line, find_mistake
from ppo_jax.data.jsonl import read_jsonl, truncate_jsonl
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.report import page
from ppo_jax.runs import trained
from ppo_jax.runs.checkpoints import manifests, resuming, store
from ppo_jax.runs.checkpoints.errors import CheckpointError, DamagedCheckpoint
from ppo_jax.runs.evaluation import earlier_evaluations
from ppo_jax.runs.output import rundir
from tests import finished_run
from tests.fuzz.inputs import HOSTILE

GONE = object()
METRICS = {"phase": "eval", "step": 2, "time": 1.5, "reward": 0.5, "kl": None, "reward_std": "Infinity"}
SAMPLE = {"step": 2, "index": 0, "prompt": "a", "response": "b", "scores": {"reward": 0.5}}
EVALUATION = {"step": 2, "columns": {"reward": [0.5, None], "valid": [True, False]}}
RUN = {
    "sessions": [
        {
            "command": "c",
            "started": "2026-01-31T12:00:00+00:00",
            "commit": None,
            "versions": {"jax": "1"},
            "machine": "m",
        }
    ],
    "base": "b",
    "prompts": 4,
    "held_out": 2,
    "measured_on": "held-out prompts",
    "judges": {"words": "a count"},
    "reward_accuracy": 0.7,
    "reward_mean": 0.0,
    "reward_std": 1.0,
}
SUMMARY = {
    "title": "t",
    "task": "what",
    "before": {"reward": 0.0, "reward_std": 1.0},
    "after": {"reward": 1.0, "reward_std": 1.0, "kl": 3.0},
    "prompts": 4,
    "measured_on": "held-out prompts",
    "kl_budget": 5.0,
    "reward_accuracy": 0.7,
    "judges": {"words": "a count"},
    "judge_accuracy": 0.6,
    "reference_accuracies": {"chance": 0.5},
    "reward_accuracy_note": "pairs",
    "seconds": {"ppo": 2.0, "eval": 1.0},
    "versions": {"jax": "1"},
    "machine": "m",
    "seed": 0,
    "date": "2026-01-01",
    "notes": ["n"],
}


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value in a document."""
    yield path
    for key in node if isinstance(node, dict) else ():
        yield from places(node[key], (*path, key))


def variants(document: Any, values: list[Any]) -> Iterator[tuple[tuple, Any, Any]]:
    """(where, what, the document with that there), for every place and value; `GONE`: nothing is there."""
    for path in places(document):
        for value in (GONE, *values) if path else values:
            holder = {"": copy.deepcopy(document)}
            node: Any = holder
            for key in ("", *path)[:-1]:
                node = node[key]
            if value is GONE:
                del node[path[-1]]
            else:
                node[("", *path)[-1]] = copy.deepcopy(value)
            yield path, value, holder[""]


def refusal(action: Callable[[], Any], *named: str) -> str | None:
    """What a ValueError said, each of `named` in it; None where all went well. Anything else is a fault."""
    try:
        action()
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert all(name in said for name in named), said
        return said
    return None


SOME = [None, True, -1, 1.5, "x", [1], {"": {}}, 10**400]  # one of a kind; the sweep through whole readers is slower


def test_lines(tmp_path: Path) -> None:
    """Readers of whole files: a resumed run's, a report's."""
    refused = 0
    for name, line in ((rundir.METRICS, METRICS), (rundir.SAMPLES, SAMPLE), (rundir.EVALUATIONS, EVALUATION)):
        file = tmp_path / name
        for _, _, changed in variants(line, HOSTILE):
            file.write_text("\n".join(json.dumps(x) for x in (line, changed, line)) + "\n")
            said = refusal(lambda file=file: read_jsonl(file), str(file), "line 2")
            assert (refusal(lambda file=file: truncate_jsonl(file, 2), str(file), "line 2") is None) == (said is None)
            refused += said is not None
            if name == rundir.METRICS and said is None:
                for value in earlier_evaluations(tmp_path).values():
                    assert all(x is None or math.isnan(float(x)) or float(x) is not None for x in value.values())
    assert refused > 200


def test_what_a_refusal_says(tmp_path: Path) -> None:
    file = tmp_path / rundir.METRICS
    for changed, words in [
        ({"step": "3"}, "line 7: step is '3', which should be a whole number, 0 or more; mend or delete the line"),
        ({"kl": "high"}, "line 7: kl is 'high', which should be a number"),
        ({"phase": 3}, "line 7: phase is 3, which should be a valid string"),
    ]:
        with pytest.raises(ValueError) as error:
            check_line(file, 7, METRICS | changed)
        assert str(error.value).startswith(f"{file}, {words}")
    with pytest.raises(ValueError, match=r"line 7: scores\.reward is 'x', which should be a number"):
        check_line(tmp_path / rundir.SAMPLES, 7, SAMPLE | {"scores": {"reward": "x"}})
    check_line(tmp_path / "data.jsonl", 1, {"phase": 3})  # of the user, who has a reader of its own


@pytest.mark.parametrize("value", [0.5, 3, None, "Infinity", "-Infinity", float("nan"), float("inf")])
def test_what_a_metric_may_be(value: Any) -> None:
    check_line(Path(rundir.METRICS), 1, METRICS | {"reward": value})


def test_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is made again of what is accepted; without the curves, which are not of the summary."""
    file = tmp_path / rundir.SUMMARY
    for _, _, changed in variants(SUMMARY, SOME):
        file.write_text(json.dumps(changed))
        if refusal(lambda: rundir.read_summary(tmp_path), str(file)) is None:
            page.gather(tmp_path, rundir.read_summary(tmp_path))
    for text in ("", "{", "[" * 10**5):
        file.write_text(text)
        assert refusal(lambda: rundir.read_summary(tmp_path), str(file), "not JSON")


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    """The page is made again of what is accepted."""
    file = tmp_path / rundir.RUN
    for _, _, changed in variants(RUN, SOME):
        file.write_text(json.dumps(changed))
        if refusal(lambda: rundir.read_facts(tmp_path), str(file)) is None:
            page.gather(tmp_path, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("runs"), steps=(2,), final=3)


def test_an_artifact(run: Path) -> None:
    folder = run / EXPORT / "policy"
    file = folder / artifacts.DESCRIPTION
    good = file.read_bytes()
    description = json.loads(good)
    description["meta"] |= {"accuracy": 0.5, "measured_on": "pairs"}
    try:
        for path, _, changed in variants(description, SOME):
            if path[:1] != ("model",):  # its own reader compares it with the base's
                file.write_text(json.dumps(changed))
                refusal(lambda: artifacts.load(folder), str(run))
    finally:
        file.write_bytes(good)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Another description of a checkpoint, with the right checksum."""
    file = checkpoint / "meta" / "metadata"
    document = change(json.loads(file.read_bytes()))
    file.write_text(json.dumps(document | {"checksum": manifests.document_sum(document)}))


def test_a_checkpoint(run: Path) -> None:
    """What a run is resumed from and a policy is taken from: meta, facts, base, name, fingerprint, config, best."""
    checkpoint = run / rundir.CHECKPOINTS / "2"
    file = checkpoint / "meta" / "metadata"
    good = file.read_bytes()
    meta = json.loads(good)["meta"]
    meta |= {"best": {"step": 2, "metric": "reward", "value": 0.5}}
    meta["facts"]["stage"] = None
    refused = 0
    try:
        for path, value, changed in variants({"meta": meta}, SOME):
            if not path:
                continue
            rewrite(checkpoint, lambda document, changed=changed: {**document, "meta": None, **changed})
            said = refusal(lambda: store.read_meta(checkpoint.parent), str(checkpoint))
            refused += said is not None
            if said is None:
                found = store.read_meta(checkpoint.parent)
                resuming.differences(found.get("facts", {}), {"seed": 1})
                if value is GONE:
                    refusal(lambda: trained.find(run, 2))
            else:
                assert path == ("meta",) or path[-1] in said or value in (GONE, {"": {}}), (path, said)
    finally:
        file.write_bytes(good)
    assert refused > 40
    rewrite(checkpoint, lambda document: {n: x for n, x in document.items() if n != "meta"})
    with pytest.raises(DamagedCheckpoint, match="its description"):
        store.read_meta(checkpoint.parent)
    file.write_bytes(good)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora.q.a"], "lora.q of the adapter is not a pair of arrays a and b"),
        (["lora.q.b"], "lora.q of the adapter is not a pair"),
        (["lora.q.a", "lora.q.b", "lora.q.c"], "lora.q of the adapter is not a pair"),
        (["lora.q"], "lora.q of the adapter is not a pair"),
        (["lora.q.a", "lora.q.b", "lora.q.magnitude.x"], "lora.q.magnitude of the adapter is a group of arrays"),
        (["lora"], "lora of the adapter is an array"),
        (["lora.q.a.x", "lora.q.b"], "lora.q of the adapter is not a pair"),
        (["lora.q.a", "lora.q.a.x", "lora.q.b"], "lora.q.a.x of the adapter lies below another array"),
        (["lora.q.a.x", "lora.q.a", "lora.q.b"], "lora.q.a of the adapter is both an array and a group"),
    ],
)
def test_an_adapter_that_is_no_pairs(names: list[str], words: str) -> None:
    """The arrays that a checkpoint describes are not those of any adapter."""
    leaf = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        trained.build_adapter(dict.fromkeys(names, leaf), 1.0)
    assert str(error.value).startswith(words)


def test_a_checkpoint_whose_adapter_lacks_one_of_a_pair(run: Path) -> None:
    checkpoint = run / rundir.CHECKPOINTS / "2"
    file = checkpoint / "meta" / "metadata"
    good = file.read_bytes()

    def change(document: dict[str, Any]) -> dict[str, Any]:
        del document["manifest"]["policy.adapter.lora.q.b"]
        return document

    try:
        rewrite(checkpoint, change)
        with pytest.raises(CheckpointError, match=f"^{checkpoint}: lora.q of the adapter is not a pair"):
            trained.find(run, 2)
    finally:
        file.write_bytes(good)


def test_a_record_may_say_more() -> None:
    from ppo_jax.data.documents import CheckpointMeta

    assert find_mistake(CheckpointMeta, {"config": "", "facts": {"seed": [1]}, "other": object()}) is None
