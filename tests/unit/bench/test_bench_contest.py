"""Numbers: medians, ratios, the options, and the activations everybody is given."""

import numpy as np
import pytest

from sae.bench import contest, cuda, learning, rates, suites, train
from sae.bench.contest import Case, Outcome, compare, summarise
from sae.bench.data import synthetic
from sae.bench.learning import Learned
from sae.bench.options import BenchOptions
from sae.bench.process import Contestant
from sae.errors import UserError

CASE = Case("topk", 8, 32, 2, 16)


def outcome(ms, fvu=0.5, l0=2.0):
    return Outcome("1.2.3", "float32", "torch", "as it comes", ms, fvu, l0, None)


def test_a_ratio_is_of_medians():
    row = compare(CASE, outcome([1.0, 2.0, 90.0]), Contestant("sae-lens", "float32"), outcome([8.0, 5.0, 6.0]),
                  BenchOptions(), 7)  # fmt: skip
    assert (row["ours_ms"], row["peer_ms"], row["ratio"]) == (2.0, 6.0, 3.0)
    assert row["peer_ms_low"] == pytest.approx(5.2)
    assert row["ours_ms_high"] == pytest.approx(72.4)
    assert (row["peer"], row["peer_version"], row["n_steps"], row["threads"]) == ("sae-lens", "1.2.3", 7, 2)
    untimed = compare(CASE, outcome([]), Contestant("reference", "reference"), outcome([]), BenchOptions(), 7)
    assert untimed["ratio"] is None
    assert untimed["fvu_peer"] == 0.5


def test_summarise_one_value():
    assert summarise([4.0]) == (4.0, 4.0, 4.0)


def test_everybody_learns_at_the_same_rate():
    assert Case("topk", 8, 2**14, 2, 16).lr == pytest.approx(2e-4)
    assert Case("topk", 8, 2**12, 2, 16).lr == pytest.approx(4e-4)


def test_options_are_checked():
    with pytest.raises(UserError, match="unknown peer 'saelens': did you mean sae-lens"):
        BenchOptions(peers=("saelens",))
    with pytest.raises(UserError, match=r"bench\.repeats=0"):
        BenchOptions(repeats=0)
    assert BenchOptions(warmup_steps=3, repeats=4, turn_steps=5).n_steps == 23


def test_cases_follow_the_peers_that_are_asked_for():
    everything = train.cases(BenchOptions())
    assert [len(peers) for _, peers in everything] == [5, 3, 3, 2, 3]
    alone = train.cases(BenchOptions(peers=()))
    assert all([one.name for one in peers] == ["reference"] for _, peers in alone)
    assert {case.d_in for case, _ in train.cases(BenchOptions(quick=True))} == {32, 48}


def test_rates_are_tried_for_a_quarter_of_the_steps_and_for_all():
    assert rates.lengths(BenchOptions()) == [500, 2_000]
    assert rates.lengths(BenchOptions(steps=1)) == [1]
    assert rates.lengths(BenchOptions(quick=True)) == [5, 20]


def test_a_figure_over_seeds_is_their_mean_and_extremes():
    found = learning.over_seeds([Learned(fvu, l0, dead, {}) for fvu, l0, dead in ((0.1, 4, 0), (0.4, 5, 0.5))])
    assert found == {
        "fvu": pytest.approx(0.25), "fvu_by_seed": [0.1, 0.4], "fvu_low": 0.1, "fvu_high": 0.4, "l0": 4.5, "dead": 0.25
    }  # fmt: skip


def test_a_model_without_text_is_skipped_with_a_sentence(tmp_path, capsys):
    assert list(learning.tasks("rates", tmp_path, BenchOptions(models=("another",)))) == []
    assert "bench rates: 'another' is skipped, since bench.text= names no text" in capsys.readouterr().out


def test_suites_are_found_by_name(monkeypatch):
    assert suites.pick("all")[0] == "train"
    assert suites.pick("grid") == ["grid"]
    with pytest.raises(UserError, match=r"unknown suite 'tran'.* suite= takes one of train, quality, .*, all\."):
        suites.pick("tran")
    monkeypatch.setitem(suites.SUITES, "none", "a suite that is not there")
    assert suites.load("none") is None
    for name in ("train", "quality", "rates", "grid", "cuda"):
        found = suites.load(name)
        assert callable(found.run)
        assert found.columns


def test_synthetic_activations(tmp_path):
    first, again, other = (
        synthetic(tmp_path / name, d_in=16, batch_tokens=128, n_batches=3, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    x, held_out = np.load(first.train), np.load(first.held_out)
    assert x.shape == (3, 128, 16)
    assert x.dtype == held_out.dtype == np.float32
    assert held_out.shape == (256, 16)
    assert float((x.astype(float) ** 2).sum(-1).mean()) == pytest.approx(16, rel=1e-5)
    assert float((held_out.astype(float) ** 2).sum(-1).mean()) == pytest.approx(16, rel=0.1)
    assert (x == np.load(again.train)).all()
    assert (x != np.load(other.train)).any()
    assert len(np.unique(np.concatenate([x.reshape(-1, 16), held_out]), axis=0)) == 3 * 128 + 256


class Scripted:
    """A worker with set times that notes what it is asked."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def ask(self, do, **fields):
        self.log.append((self.name, do))
        replies = {
            "hello": {"version": "1", "torch": "2"},
            "build": {"dtype": "float32", "kernels": "torch", "options": ""},
            "run": {"ms": [1.0] * fields.get("n_steps", 0)},
            "evaluate": {"fvu": 0.1, "l0": 2.0},
        }
        return replies.get(do, {})


def test_contestants_take_turns(tmp_path):
    log = []
    data = synthetic(tmp_path, d_in=8, batch_tokens=16, n_batches=1)
    workers = {Contestant(name, "x"): Scripted(name, log) for name in ("ours", "peer")}
    options = BenchOptions(repeats=3, turn_steps=2, warmup_steps=4)
    found = contest.race(workers, CASE, data, options)
    assert [name for name, do in log if do == "run"] == ["ours", "peer"] * 4  # the first turn is the warm-up
    assert all(one.ms == [1.0] * 6 for one in found.values())


def test_rates_on_a_gpu():
    case = Case("topk", 1000, 10_000, 10, 2_000)
    one = Outcome("1", "bfloat16", "triton", "", [4.0, 4.0], 0.5, 10.0, 3 * 2**30)
    row = cuda._row(case, Contestant("ours", "default"), one, 100e12, BenchOptions())
    assert row["mtok_s"] == pytest.approx(0.5)
    assert row["mfu"] == pytest.approx(0.5e6 * (2 * 1000 * 10_000 + 8 * 1000 * 10) / 100e12)
    assert row["dense_mfu"] == pytest.approx(0.5e6 * 12 * 1000 * 10_000 / 100e12)
    assert row["peak_gib"] == 3.0
    assert row.keys() >= {*cuda.COLUMNS} - {"ratio"}
