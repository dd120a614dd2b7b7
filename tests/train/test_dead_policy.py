"""A learning rate that kills the policy: the metrics tell the update that does it from good ones, and what is left."""

import numpy as np

from tests.train import toy


def test_the_metrics_show_a_policy_that_a_step_has_killed() -> None:
    run = toy.iteration()
    state = toy.start()
    good, bad = toy.HYPER._replace(learning_rate=3e-3), toy.HYPER._replace(learning_rate=1e3)
    records = []
    for number, hyper in enumerate([good, bad, good, good]):
        state, metrics = run(state, toy.FROZEN, toy.prompts(number), hyper)
        records.append(toy.numbers(metrics))
    healthy, killed, dead = records[0], records[1], records[2:]
    assert 0.5 < healthy["ratio_min"] < healthy["ratio_max"] < 2 and 1e-4 < healthy["approx_kl"] < 0.1
    assert healthy["policy_grad_norm"] > 0.1
    assert min(killed["ratio_min"], 1 / killed["ratio_max"]) < 1e-3 and killed["approx_kl"] > 1
    assert not killed["nonfinite_updates"], "it is finite: nothing skips it"
    for record in dead:  # no step moves it: the ratio to what sampled is 1 in every epoch
        assert record["policy_grad_norm"] < 1e-6 * killed["policy_grad_norm"] and record["approx_kl"] < 1e-6
        assert record["ratio_min"] > 0.999 and record["ratio_max"] < 1.001
        assert np.isfinite(list(record.values())).all()
