"""`ppo-jax dpo`: pairs with their response starts, a run directory, the command, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.cli import main as cli
from ppo_jax.data import PairBatch, PairRecord, right_pad
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.runs.dpo import Pairs, batch_in_order, encode, preferences, run_dpo
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.train.dpo import DPOConfig, counted
from tests.data.tokenizer import EOS, make_tokenizer
from tests.small import SMALL, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


def records(count: int = 24) -> list[PairRecord]:
    """The chosen answer says a, the rejected one b; prompts and lengths differ."""
    rng = np.random.default_rng(0)
    text = lambda words: " ".join(words)
    prompt = lambda: text(rng.choice(list("cdefg"), rng.integers(1, 4)))
    answer = lambda word: text([word] * int(rng.integers(1, 4)))
    return [PairRecord(prompt(), answer("a"), answer("b"), 0.0, f"pairs:{i}") for i in range(count)]


def whole(pairs: Pairs) -> tuple[PairBatch, np.ndarray]:
    """All pairs in their order as one batch."""
    encoded = pairs.encoded
    length = max(map(len, [*encoded.chosen, *encoded.rejected]))
    sides = [x for side in (encoded.chosen, encoded.rejected) for x in right_pad(side, length, 0)]
    count = len(encoded.chosen)
    return PairBatch(*sides, np.zeros(count, np.float32), np.arange(count)), pairs.starts


def test_responses_and_only_they_are_compared() -> None:
    tokenizer = make_tokenizer()
    given = [*records(3), PairRecord(None, "a b", "b", 0.0, "pairs:3")]
    pairs = encode(given, tokenizer, 32)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = preferences(*whole(pairs))
    for row, record in enumerate(given):
        for side, answer in enumerate((record.chosen, record.rejected)):
            tokens, mask, loss_mask = (np.asarray(x)[row, side] for x in batch)
            np.testing.assert_array_equal(tokens[loss_mask], [*ids(answer), EOS])
            prompt = [] if record.prompt is None else ids(record.prompt)
            assert tokens[mask & ~loss_mask].tolist()[-len(prompt) or None :] == prompt


def test_messages_and_truncation_keep_the_responses() -> None:
    tokenizer = make_tokenizer()
    say = lambda role, text: {"role": role, "content": text}
    chat = PairRecord([say("user", "c d")], [say("assistant", "a")], [say("assistant", "b b")], 0.0, "pairs:1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    uncut = encode([chat], tokenizer, 64)
    for limit in (64, max(len(ids("a")), len(ids("b b"))) + 2):
        pairs = encode([chat], tokenizer, limit, "truncate_left")
        for side, (rows, text) in enumerate([(pairs.encoded.chosen, "a"), (pairs.encoded.rejected, "b b")]):
            assert rows[0][pairs.starts[0, side] :] == [*ids(text), EOS]
    assert len(pairs.encoded.rejected[0]) < len(uncut.encoded.rejected[0])  # something was cut
    with pytest.raises(ValueError, match="pairs:1: a response alone does not fit"):
        encode([chat], tokenizer, 2, "truncate_left")


def test_all_pairs_once_in_batches_of_one_shape() -> None:
    pairs = encode(records(7), make_tokenizer(), 32)
    batches = list(batch_in_order(pairs, 3, 0))
    assert len({piece.tokens.shape for piece in batches}) == 1
    assert [int(counted(piece).sum()) for piece in batches] == [3, 3, 1]


def test_a_run_leaves_policy_and_model(model: Model, screen: Screen, tmp_path: Path) -> None:
    pairs = encode(records(), model.tokenizer, 32)
    dpo = DPOConfig(batch_size=8, steps=12, learning_rate=1e-2, accumulate=2)
    result = run_dpo(tmp_path, OfflineSetup(model, pairs, pairs, dpo, 0, AdapterConfig(rank=4)), screen)
    assert result.before["accuracy"] == 0.5 and result.after["accuracy"] > 0.9 and result.after["pairs"] == 24
    values = read_jsonl(tmp_path / rundir.METRICS)
    assert {r["phase"] for r in values} == {"dpo"} and [r["step"] for r in values] == [0, *range(1, 13), 12]
    found = artifacts.load(tmp_path / "export" / "policy", "policy")
    artifacts.check_base(found, model.fingerprint, model.config)
    assert found.meta["heldout"]["accuracy"] == result.after["accuracy"]
    assert load_model(tmp_path / "export" / "model").fingerprint == result.model.fingerprint


def test_the_command(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    hf.save(tmp_path / "base", SMALL, model.params, model.tokenizer)
    lines = [json.dumps({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}) for r in records(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    args = "dpo --model base --pairs pairs.jsonl --run-dir run --dpo.batch-size {} --dpo.steps 2".format
    assert cli.main(args(64).split()) == cli.MISTAKE
    assert "--dpo.batch-size 64, but pairs.jsonl leaves only 32 to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # tyro's
        cli.main([*args(8).split(), "--dpo.beta", "-1"])
    assert "beta=-1.0 must be a positive number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(args(8).split()) == 0
    assert (tmp_path / "run" / "export" / "model" / "model.safetensors").is_file()
    assert cli.main(["generate", "--policy", "run", "--prompt", "c", "--sampling.response-length", "2"]) == 0
    assert "\n>>> " in capsys.readouterr().out


def test_a_bos_counts_where_a_response_is_cut() -> None:
    """Room for 5: BOS, and 4 of an answer that has 5 tokens with its EOS. The first of them would be lost."""
    tokenizer = make_tokenizer(bos=True)
    pairs = [PairRecord("a", "bcde", "b", 0.0, "pairs:1")]
    with pytest.raises(ValueError, match="pairs:1: a response alone does not fit into 5 tokens"):
        encode(pairs, tokenizer, 5, "truncate_left")
    fits = encode(pairs, tokenizer, 6, "truncate_left")
    assert fits.starts.tolist() == [[1, 1]], "after BOS, the prompt being cut from both"
