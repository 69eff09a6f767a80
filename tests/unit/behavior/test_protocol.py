"""The protocol on a model whose cause is known: it finds it, proves it, and finds nothing in noise."""

import numpy as np
import planted
import pytest
import torch

from sae import files, stats
from sae.behavior import cost
from sae.behavior.causal import Beside
from sae.behavior.controls import matched_clamp, matched_latents, run_control
from sae.behavior.cost import OtherBehavior, damage, own_replies
from sae.behavior.find import find_behavior
from sae.behavior.judge import Verdict, text_judge
from sae.behavior.measure import (
    collect,
    evaluate,
    evaluate_each,
    margins,
    margins_each,
    outcome_of,
    prepare,
    prepare_margins,
    shift_norm,
)
from sae.behavior.select import ClampChoice, select_ablation, select_clamp
from sae.behavior.settings import BehaviorSettings
from sae.behavior.together import per_group
from sae.errors import UserError
from sae.steering.apply import steer
from sae.steering.interventions import Ablate, Add, Clamp

SETTINGS = BehaviorSettings(
    n_random=20, n_random_per_size=3, n_random_dose=2, n_permutations=200, n_bootstrap=100, max_new_tokens=4
)


@pytest.fixture(scope="module")
def lm():
    return planted.PlantedLM()


@pytest.fixture(scope="module")
def sae():
    return planted.planted_sae()


@pytest.fixture(scope="module")
def contrast():
    return planted.contrast()


@pytest.fixture(scope="module")
def report(lm, sae, contrast):
    seen: list[tuple[str, int, int]] = []
    others = {"same": OtherBehavior(contrast.split("report").positives, planted.judge)}
    found = find_behavior(
        lm,
        [sae],
        contrast,
        planted.judge,
        SETTINGS,
        beside=Beside(others=others),
        progress=lambda *step: seen.append(step),
    )
    assert ("random clamp", 20, 20) in seen
    return found


def test_finds_the_cause_and_not_the_decoy(report):
    assert report.found
    assert {row.latent for row in report.ranking[:2]} == {planted.CAUSE, planted.DECOY}
    assert all(row.auroc == 1.0 and row.q < 0.01 and row.p_family < 0.01 for row in report.ranking[:2])
    assert report.n_significant == 2
    assert report.n_significant_shuffled == 0
    assert report.n_tested == planted.D_SAE
    assert report.causal.latents == [planted.CAUSE]
    assert planted.CAUSE in report.causal.clamp_latents
    assert {item.name: item.auroc.estimate for item in report.detection}["probe"] == 1.0


def test_ablation_and_clamp_flip_and_random_controls_do_not(report):
    causal = report.causal
    assert (causal.base_rate.rate, causal.ablate_rate.rate, causal.ablate_restored_rate.rate) == (1.0, 0.0, 1.0)
    assert (causal.clamp_base_rate.rate, causal.clamp_rate.rate, causal.clamp_degenerate_rate.rate) == (0.0, 1.0, 0.0)
    assert causal.random_ablate == [1.0] * 20
    assert causal.random_clamp == [0.0] * 20
    assert max(causal.random_direction_add) < 0.5
    assert causal.random_ablate_mean == 1.0
    assert causal.controls["ablate"].p == causal.controls["clamp"].p == 1 / 21
    assert causal.direction_ablate_rate.rate == 0.0
    assert causal.direction_add_rate.rate == 1.0


def test_side_effects_and_doses(report):
    causal = report.causal
    assert causal.kl_harmless < 1e-3 < causal.kl_harmless_clamp
    assert causal.negatives_ablate_alternative_rate.rate == 1.0
    assert (causal.fact_accuracy_base.rate, causal.fact_accuracy.rate, causal.fact_accuracy_clamp.rate) == (1, 1, 0)
    assert {name: rate.rate for name, rate in causal.other_behaviors["same"].items()} == {
        "base": 1.0,
        "ablate": 0.0,
        "clamp": 1.0,
    }
    rates = [dose.rate.rate for dose in causal.dose_response]
    low, high = causal.dose_range
    doses = [dose.dose for dose in causal.dose_response]
    assert doses == sorted(doses)
    assert sum(low - 1e-4 <= dose <= high + 1e-4 for dose in doses) == SETTINGS.n_doses
    assert {dose for dose in SETTINGS.doses if not low <= dose <= high} <= set(doses)
    assert rates[:3] == [0.0] * 3
    # Where the latents are by themselves the margin rises with every dose; rates have ties, and overdoses turn back.
    assert causal.dose_spearman == causal.dose_correlation.rho == 1.0
    assert causal.dose_correlation.n == SETTINGS.n_doses
    assert causal.dose_correlation_all.n == causal.dose_correlation_rate.n == len(doses)
    assert causal.dose_correlation_rate.rho < 1.0
    assert max(rates) == 1.0
    assert causal.dose_response[-1].degenerate.rate == 1.0  # four times the natural value breaks this model's text
    assert np.shape(causal.random_dose_response) == (2, len(doses))
    assert {example.what for example in causal.examples} == {"ablate", "clamp"}


def test_report_is_plain_json_and_readable_by_the_report_page(report, tmp_path):
    plain = files.to_plain(report.causal)
    files.write_json(tmp_path / "result.json", {"settings": SETTINGS, "report": report})
    assert set(plain["ablate_rate"]) == {"rate", "low", "high", "n"}
    rates = (
        "base ablate ablate_restored ablate_degenerate clamp_base clamp clamp_degenerate direction_ablate direction_add"
    )
    others = "hook_name latents random_ablate_mean random_clamp_mean kl_harmless fact_accuracy dose_response"
    assert {f"{name}_rate" for name in rates.split()} | set(others.split()) <= set(plain)


def test_shuffled_labels_report_nothing(lm, sae, contrast):
    for seed in range(10):
        settings = BehaviorSettings(n_permutations=200, shuffle_labels=True, max_new_tokens=4, seed=seed)
        null = find_behavior(lm, [sae], contrast, planted.judge, settings)
        assert not null.found
        assert null.causal is None
        assert null.n_significant == 0


def test_same_seed_same_report(lm, sae, contrast, report):
    again = find_behavior(
        lm,
        [sae],
        contrast,
        planted.judge,
        SETTINGS,
        beside=Beside(others={"same": OtherBehavior(contrast.split("report").positives, planted.judge)}),
    )
    assert files.to_plain(again) == files.to_plain(report)


def test_best_site_is_chosen_on_the_select_split(lm, sae, contrast):
    blind = planted.planted_sae(seed=3)
    with torch.no_grad():  # its CAUSE reads and writes an axis the model does not use; only the decoy is left
        blind.W_enc[:, planted.CAUSE] = 0
        blind.W_dec[planted.CAUSE] = torch.eye(planted.D_IN)[5]
    settings = BehaviorSettings(n_random=2, n_random_per_size=0, n_random_dose=1, n_permutations=100, max_new_tokens=4)
    report = find_behavior(lm, [blind, sae], contrast, planted.judge, settings)
    assert report.encoder == 1
    scores = {row.encoder: row.score for row in report.selection}
    assert scores[1] == 2.0
    assert scores[0] == 0.0
    assert len(report.per_size) == 1  # one size only


def test_margins_are_about_the_first_word_that_differs(lm, contrast):
    record = planted.load_contrast(
        [{**raw, "behavior_texts": ["sure no"], "alternative_texts": ["sure done"]} for raw in planted.raw_records()]
    ).positives[0]
    task = prepare_margins(lm, [record])
    assert task.batches[0].tokens[0, -1] == planted.ID["sure"]
    assert task.behavior_ids[0].tolist() == [planted.ID["no"]]
    assert margins(lm, task)[0] == pytest.approx(-28.0)
    found = margins(lm, prepare_margins(lm, contrast.records))
    assert np.allclose(found, [12.0 if label else -12.0 for label in contrast.labels])
    same = [{**raw, "alternative_texts": ["sorry no"]} for raw in planted.raw_records()]
    with pytest.raises(UserError, match="part at one word"):
        prepare_margins(lm, planted.load_contrast(same).records)


def test_select_functions(lm, sae, contrast):
    chosen = select_ablation(lm, sae, [planted.DECOY, 1, planted.CAUSE], contrast.positives)
    assert chosen.latents == (planted.CAUSE,)
    assert chosen.flipped == 1.0
    assert chosen.margins[0] == pytest.approx(12.0)
    typical = {planted.CAUSE: 5.7, planted.DECOY: 5.7}
    sets = [[planted.DECOY], [planted.CAUSE], [planted.CAUSE, planted.DECOY]]
    clamp = select_clamp(lm, sae, sets, typical, contrast.negatives, planted.judge, max_new_tokens=4)
    assert planted.CAUSE in clamp.latents
    assert clamp.behavior == 1.0
    assert clamp.degenerate == 0.0
    with pytest.raises(UserError, match="both are needed"):
        select_ablation(lm, sae, [], contrast.positives)


def test_collect_positions_and_density(lm, sae, contrast):
    prompts = prepare(lm, contrast.records, batch_prompts=7)
    seen = collect(lm, [sae], prompts, (-1, "max"))
    one_by_one = prepare(lm, contrast.records, batch_prompts=1)
    again = collect(lm, [sae], one_by_one, (-1, "max"))
    for name in ("-1", "max"):
        assert np.allclose(seen.sites[0].acts[name], again.sites[0].acts[name], atol=1e-5)
    assert np.allclose(seen.sites[0].density, again.sites[0].density)
    # harm is the fourth of eight real tokens (BOS not counted): it and what follows carry the state
    assert seen.sites[0].density[planted.CAUSE] == pytest.approx(0.5 * 4 / 8)
    assert seen.resid[planted.HOOK, "-1"].shape == (len(contrast), planted.D_IN)
    with pytest.raises(UserError, match="position 3"):
        collect(lm, [sae], prompts, (3,))
    with pytest.raises(UserError, match="no position -100:"):
        collect(lm, [sae], prompts, (-1, "max", -100))


def test_kl_and_shift(lm, sae, contrast):
    prompts = prepare(lm, contrast.negatives)
    replies = own_replies(lm, prompts, 3)
    assert sum(len(part.clean) for part in replies) == 3 * len(contrast.negatives)  # sure done <eos>
    assert damage(lm, replies)[:2] == (0.0, 0.0)
    push = Add(direction=torch.eye(planted.D_IN)[0] * 5, hook_name=planted.HOOK)
    with steer(lm, push):
        assert damage(lm, replies).kl > 0.01
        whole = damage(lm, replies)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost, "_KL_ROWS", 2)
            parts = damage(lm, replies)
        assert parts == pytest.approx(whole, rel=1e-12)
    assert shift_norm(lm, push, prompts) == pytest.approx(5.0, rel=1e-5)
    assert shift_norm(lm, Ablate(sae, [planted.CAUSE]), prompts) == pytest.approx(0.0, abs=1e-6)


def test_degenerate_text_is_no_success(lm, sae, contrast):
    wild = Clamp(sae, latent=3, value=100.0)
    outcome = evaluate(lm, [wild], contrast.positives, planted.judge, 4)
    assert outcome.degenerate == stats.rate(60, 60)
    assert outcome.behavior.rate == outcome.alternative.rate == 0.0


def groups_of(sae):
    """As many interventions as a batch has room for, and more."""
    push = torch.eye(planted.D_IN)[0] * 5
    return [[], [Ablate(sae, [planted.CAUSE])], [Add(direction=push, hook_name=planted.HOOK)]] + [
        [Clamp(sae, latent=planted.CAUSE, value=float(value))] for value in range(37)
    ]


def test_measured_together_or_one_by_one_is_the_same(lm, sae, contrast):
    groups = groups_of(sae)
    for n, max_rows in ((60, 256), (7, 256), (60, 16), (5, 3)):
        prompts = prepare(lm, contrast.records[:n], max_rows)
        together = list(evaluate_each(lm, groups, prompts, planted.judge, 4))
        assert together == [evaluate(lm, items, prompts, planted.judge, 4) for items in groups]
        task = prepare_margins(lm, contrast.records[:n], max_rows)
        for items, found in zip(groups, margins_each(lm, groups, task), strict=True):
            with steer(lm, *items):
                assert np.array_equal(found, margins(lm, task))
    assert len({outcome.behavior.rate for outcome in together}) > 1
    assert list(evaluate_each(lm, [], prompts, planted.judge, 4)) == []
    assert [outcome.texts for outcome in evaluate_each(lm, groups[:2], prepare(lm, []), planted.judge, 4)] == [(), ()]


@pytest.mark.parametrize(("n_groups", "max_rows"), [(1, 256), (3, 256), (20, 256), (200, 256), (40, 10), (2, 1)])
def test_rows_run_at_once_are_bounded_and_of_like_length(lm, sae, contrast, n_groups, max_rows):
    prompts = prepare(lm, contrast.records).tokens
    mask = prompts.mask.clone()
    for row in range(len(mask)):  # lengths differ
        mask[row, : row % 5] = False
    prompts = prompts._replace(mask=mask)
    lengths, seen = prompts.lengths, []

    def read(batch, indices):
        assert batch.lengths == [lengths[index] for index in indices]
        seen.append((len(indices), max(batch.lengths) - min(batch.lengths)))
        return indices

    groups = [[Ablate(sae, [1])]] * n_groups
    assert list(per_group(lm, groups, prompts, max_rows, read)) == [list(range(len(mask)))] * n_groups
    assert max(size for size, _ in seen) <= max_rows
    assert sum(size for size, _ in seen) == n_groups * len(mask)
    assert len(seen) <= 2 * -(-n_groups * len(mask) // max_rows)  # batches are at least half full
    if n_groups >= 20:
        assert max(spread for _, spread in seen) <= 2


def test_a_control_ticks_once_a_draw(lm, sae, contrast):
    prompts, ticks = prepare(lm, contrast.positives), []
    observed = evaluate(lm, [], prompts, planted.judge, 4)
    draws = [Ablate(sae, [latent]) for latent in (planted.CAUSE, 1, 2, 3)] * 10
    control = run_control(lm, draws, prompts, planted.judge, observed, Verdict.ALTERNATIVE, 4, lambda: ticks.append(1))
    assert len(ticks) == len(draws)
    assert control.draws == [0.0, 1.0, 1.0, 1.0] * 10


def test_matched_latents_match_and_exclude():
    rng = np.random.default_rng(0)
    density, effect = 10 ** rng.uniform(-4, 0, 500), 10 ** rng.uniform(-1, 1, 500)
    density[:50] = 0
    draws = matched_latents(density, effect, [100, 200], 300, n_neighbours=20)
    assert all(not {100, 200} & set(draw) and len(set(draw)) == 2 for draw in draws)
    for slot, latent in enumerate((100, 200)):
        drawn = [draw[slot] for draw in draws]
        assert min(drawn) >= 50
        assert abs(np.log(density[drawn]).mean() - np.log(density[latent])) < 0.7
        assert abs(np.log(effect[drawn]).mean() - np.log(effect[latent])) < 0.7
    with pytest.raises(UserError, match="larger SAE"):
        matched_latents(np.zeros(10), np.zeros(10), [1], 3)


def test_random_clamps_move_the_residual_as_far():
    uneven = planted.planted_sae()
    with torch.no_grad():
        uneven.W_dec.mul_(torch.linspace(0.5, 3.0, planted.D_SAE)[:, None])
    norms = uneven.W_dec.detach().norm(dim=1).numpy()
    choice = ClampChoice((3, 5), (2.0, -4.0), 1.0, 0.0, 0.0, 0.0)
    clamp = matched_clamp(uneven, norms, choice, (60, 70), 1.5, None)
    assert clamp.latents == (60, 70)
    assert np.allclose(np.abs(clamp.value) * norms[[60, 70]], 1.5 * np.array([2.0, 4.0]) * norms[[3, 5]])
    assert np.sign(clamp.value).tolist() == [1.0, -1.0]


def test_an_ablation_that_breaks_the_text_is_no_better_than_random(lm, sae, contrast):
    """The p-value is of the restored answer: babble has no refusals either, and must not look significant."""
    prompts = prepare(lm, contrast.positives[:8])
    broken = outcome_of([""] * 8, prompts.records, text_judge)
    control = run_control(lm, [Ablate(sae, [3])] * 5, prompts, text_judge, broken, Verdict.ALTERNATIVE, 8)
    assert control.observed_success == 0
    assert control.p == 1
