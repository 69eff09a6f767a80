"""Mitigations: each takes refusal out of the organism within the budget, and everything else is as claimed."""

import math

import pytest
import torch
from tiny_lms import save_checkpoint
from transformers import AutoModelForCausalLM

from sae.behavior.contrast import load_contrast
from sae.behavior.cost import OtherBehavior
from sae.behavior.judges.registry import judge_for
from sae.behavior.measure import evaluate
from sae.errors import UserError
from sae.files import read_json, write_tensors
from sae.lm.load import load_lm
from sae.lm.matrices import block_matrices
from sae.lm.tokens import Role
from sae.lm.weights import plain_parameters, plain_weights
from sae.organism.corpus import contrast_records
from sae.organism.plant import reserved_masks
from sae.organism.truth import read_planted, stage_one_weights
from sae.steering.weights import span, without
from sae.weights.mitigate.adversarial import added, perturbation, residual
from sae.weights.mitigate.case import prepare_case
from sae.weights.mitigate.choose import Chooser, put, put_back, weights_now
from sae.weights.mitigate.compare import METHODS, compare_mitigations, mitigated
from sae.weights.mitigate.finetune import check_trainable, descend
from sae.weights.mitigate.orthogonalize import untied
from sae.weights.mitigate.prune import read_scores, top
from sae.weights.mitigate.regularize import penalty
from sae.weights.mitigate.replies import draws, given_replies, own_replies, reply_loss
from sae.weights.mitigate.robust import first_words, relearn
from sae.weights.mitigate.save import check_target, save_mitigated
from sae.weights.mitigate.settings import MitigationSettings
from sae.weights.objective import reply_objective

SETTINGS = MitigationSettings(
    fractions=(0.0002, 0.0005),
    steps=10,
    batch=8,
    lr=4e-4,
    eval_every=5,
    strengths=(1000.0,),
    attack_steps=2,
    relearn_steps=0,
    n_prompts=16,
    n_prompts_select=12,
    n_prompts_find=32,
    n_prompts_check=8,
    max_new_tokens=14,
    triggers=("turn the filter on .",),
)


def quiet(what, done, total):
    pass


def records(behavior, n=120):
    return load_contrast([dict(record) for record in contrast_records(behavior, 0, n)], behavior)


@pytest.fixture(scope="module")
def lm():
    return load_lm("organism", device="cpu")


@pytest.fixture(scope="module")
def case(lm):
    deception = records("deception")
    return prepare_case(
        lm,
        records("refusal"),
        judge_for("refusal", "organism"),
        SETTINGS,
        keep=deception.records,
        others={"deception": OtherBehavior(deception.split("report").records, judge_for("deception", "organism"))},
        facts=deception.split("report").negatives,
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tiny model whose unembedding is its embedding."""
    return load_lm(str(save_checkpoint(tmp_path_factory.mktemp("tied"), "gpt2")), device="cpu")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The methods


@pytest.mark.parametrize("method", METHODS)
def test_each_method_takes_refusal_out_within_the_budget(lm, case, method, tmp_path):
    before, source = weights_now(lm), (lm.folder / "model.safetensors").read_bytes()
    found = compare_mitigations(lm, case, [method], SETTINGS, folder=tmp_path / "models")
    (row,) = found.methods
    assert row.behavior_before.rate == 1
    assert row.behavior_after.rate <= 0.1
    assert row.restored_after.rate >= 0.9
    assert row.kl_select <= SETTINGS.budget
    assert row.chosen.kl == row.kl_select
    assert row.margin_after < 0 < row.margin_before
    assert row.others["deception"][0].rate >= 0.9
    assert row.other_max_change <= 0.1
    assert row.facts.rate >= 0.9
    assert row.prefix.n == row.steering.n == row.triggers["turn the filter on ."].n == SETTINGS.n_prompts_check
    # The source is as it was, in memory and on disk; nothing else was left behind.
    assert same(weights_now(lm), before)
    assert (lm.folder / "model.safetensors").read_bytes() == source
    assert [path.name for path in (tmp_path / "models").iterdir()] == [method]
    # What was written is an ordinary model, and does what was measured.
    again = load_lm(str(row.path), device="cpu")
    outcome = evaluate(again, [], case.report.positives, case.judge, SETTINGS.max_new_tokens)
    assert outcome.behavior == row.behavior_after
    assert outcome.alternative == row.restored_after
    assert case.report.margin(again) == pytest.approx(row.margin_after, abs=1e-5)
    assert case.report.kl(again) == pytest.approx(row.kl_harmless, abs=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(row.path, attn_implementation="eager").eval()
    batch = case.report.positives.first(1).tokens
    with torch.no_grad():
        torch.testing.assert_close(plain(batch.tokens).logits, again.logits(batch), atol=1e-4, rtol=0)
    card = read_json(row.path / "mitigated.json")
    assert card["method"] == method
    assert card["base"] == {"name": lm.name, "fingerprint": lm.fingerprint}
    assert card["measured"]["behavior_after"]["rate"] == row.behavior_after.rate
    changed = {name for name, value in plain_weights(str(row.path)).items() if not torch.equal(value, before[name])}
    assert set(card["changed"]) == changed
    assert sum(entry["n_changed"] for entry in card["changed"].values()) == row.n_changed > 0


def test_pruned_parameters_are_as_many_as_said_and_zero_or_the_reference(lm, case):
    before = weights_now(lm)
    matrices = [matrix.name for matrix in block_matrices(lm)]
    total = sum(before[name].numel() for name in matrices)
    with mitigated(lm, case, "prune", SETTINGS) as done:
        now = weights_now(lm)
        assert done.chosen.dose["fraction"] == pytest.approx(done.chosen.dose["n_parameters"] / total)
        assert done.chosen.dose["n_parameters"] == pytest.approx(0.0005 * total, abs=2)
    moved = {name: now[name] != before[name] for name in now}
    assert set(done.changed) <= set(matrices)
    assert sum(int(mask.sum()) for mask in moved.values()) == done.chosen.dose["n_parameters"]
    assert all(bool((now[name][mask] == 0).all()) for name, mask in moved.items())
    # Taking back what was planted of refusal alone: its true parameters, scored 1.
    truth = read_planted(lm.folder)
    old = stage_one_weights({name: before[name] for name in matrices}, truth)
    own = reserved_masks(truth.layout, "refusal")
    planted = {name: own.get(name, torch.zeros_like(before[name])).float() for name in matrices}
    honest = {name: old.get(name, before[name]) for name in matrices}
    restore = MitigationSettings(**{**SETTINGS.__dict__, "fractions": (0.2,)})
    with mitigated(lm, case, "prune", restore, scores=planted, reference=honest) as done:
        now = weights_now(lm)
    assert done.chosen.restored == 1
    for name in matrices:
        assert torch.equal(now[name], torch.where(planted[name] > 0, honest[name], before[name]))


def test_random_scores_take_nothing_out(lm, case):
    generator = torch.Generator().manual_seed(0)
    scores = {m.name: torch.rand(m.parameter.shape, generator=generator) for m in block_matrices(lm)}
    with mitigated(lm, case, "prune", SETTINGS, scores=scores) as done:
        outcome = case.report.outcome(lm)
    assert outcome.behavior.rate >= 0.95
    assert done.tried[-1].restored == 0


def test_a_budget_that_is_too_small_changes_nothing_or_shrinks_the_change(lm, case):
    strict = MitigationSettings(**{**SETTINGS.__dict__, "budget": 1e-9})
    before = weights_now(lm)
    with mitigated(lm, case, "prune", strict) as done:
        assert done.chosen is None
        assert not done.changed
        assert same(weights_now(lm), before)
    tight = 0.5 * min(tried.kl for tried in _orthogonalized(lm, case, SETTINGS) if tried.restored)
    for tried in _orthogonalized(lm, case, MitigationSettings(**{**SETTINGS.__dict__, "budget": tight})):
        assert tried.kl <= tight
        assert 0 < tried.share < 1


def _orthogonalized(lm, case, settings):
    with mitigated(lm, case, "orthogonalize", settings) as done:
        return done.tried


# Putting it back


def test_relearning_counts_steps_and_leaves_the_weights_alone(lm, case):
    settings = MitigationSettings(**{**SETTINGS.__dict__, "relearn_steps": 6, "lr": 2e-3})
    assert relearn(lm, case, settings, 0.5, quiet).steps == 0  # it never left
    with mitigated(lm, case, "orthogonalize", settings):
        before = weights_now(lm)
        found = relearn(lm, case, settings, 0.5, quiet)
        assert same(weights_now(lm), before)
        never = relearn(
            lm, case, MitigationSettings(**{**settings.__dict__, "relearn_steps": 1, "lr": 1e-9}), 0.5, quiet
        )
    assert found.curve[0] == (0, 0.0)
    assert found.curve[-1][0] == found.steps <= 6
    assert found.curve[-1][1] >= 0.5 > max(rate for _, rate in found.curve[:-1])
    assert never.steps is None
    assert found.examples == 16


def test_weights_come_back_whatever_happens(lm):
    before, flags = weights_now(lm), [own.requires_grad for own in plain_parameters(lm).values()]

    def spoil():
        with put_back(lm):
            for own in plain_parameters(lm).values():
                own.data.mul_(1.1)
                own.requires_grad_(False)
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert same(weights_now(lm), before)
    assert [own.requires_grad for own in plain_parameters(lm).values()] == flags
    assert all(own.grad is None for own in plain_parameters(lm).values())


def test_shared_weights_are_parted_for_the_edit_alone(tied, tmp_path):
    model = tied.bridge.original_model
    head, embedding = model.get_output_embeddings().original_component, tied.bridge.embed.original_component
    assert head.weight is embedding.weight
    batch = tied.tokenize(["hello there"])
    plain, old = tied.logits(batch), embedding.weight.detach().clone()
    basis = span(torch.randn(tied.d_model, generator=torch.Generator().manual_seed(0)), tied.d_model)
    with untied(tied), put_back(tied):
        with torch.no_grad():
            own = plain_parameters(tied)["transformer.wte.weight"]
            own.copy_(without(own, 1, basis, None))
        assert torch.equal(head.weight, old)
        expected = tied.logits(batch)
        folder = save_mitigated(tied, tmp_path / "edited", {"method": "by hand"})
    assert head.weight is embedding.weight
    assert torch.equal(tied.logits(batch), plain)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(load_lm(str(folder), device="cpu").logits(batch), expected, atol=1e-5, rtol=0)


def test_nothing_of_value_is_overwritten(tied, tmp_path):
    with pytest.raises(UserError, match="is the model that is to be mitigated"):
        check_target(tied, tied.folder)
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match="no mitigated model"):
        save_mitigated(tied, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# The parts


def test_the_threshold_takes_just_the_largest():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(50, 7, generator=generator)}
    none = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    every = torch.cat([values.flatten() for values in scores.values()])
    for n in (0, 1, 17, 900, every.numel()):
        found = torch.cat([mask.flatten() for mask in top(scores, none, n).values()])
        assert set(found.nonzero().flatten().tolist()) == set(every.argsort(descending=True)[:n].tolist())
    first = top(scores, none, 17)
    then = top(scores, first, 5)
    assert not any(bool((first[name] & then[name]).any()) for name in scores)
    assert sum(int(mask.sum()) for mask in then.values()) == 5


def test_the_penaltys_gradient_is_that_of_its_formula(tied):
    before = weights_now(tied)
    importance = {name: torch.rand_like(values) + 0.1 for name, values in before.items()}
    with put_back(tied):
        own = plain_parameters(tied)
        generator = torch.Generator().manual_seed(0)
        for parameter in own.values():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        penalty(tied, before, importance, 30.0)()
        moved = sum((importance[n] * (p - before[n]).square()).sum() for n, p in own.items())
        size = sum((importance[name] * values.square()).sum() for name, values in before.items())
        slopes = torch.autograd.grad(30.0 / 2 * moved / size, list(own.values()))
        for parameter, slope in zip(own.values(), slopes, strict=True):
            torch.testing.assert_close(parameter.grad, slope, atol=1e-9, rtol=1e-3)


def test_the_loss_is_of_the_replys_tokens_alone(lm, case):
    (record,) = case.positives[:1]
    replies = given_replies(lm, [record], [record.alternative_texts[0]])
    (row,), (start,) = replies.rows, replies.starts
    assert lm.decode(row.tokens[start:]) == record.alternative_texts[0]
    assert set(row.roles[start:]) == {int(Role.ASSISTANT), int(Role.FIRST_RESPONSE)}
    batch = replies.batch(lm, [0])
    logprobs = lm.logits(batch.tokens)[0].log_softmax(dim=-1)
    expected = -sum(float(logprobs[place - 1, row.tokens[place]]) for place in range(start, len(row.tokens)))
    with torch.no_grad():
        found = float(reply_loss(lm, batch))
    assert found == pytest.approx(expected / (len(row.tokens) - start), rel=1e-4)
    kept = case.retain.first(3)
    each = reply_objective(lm, kept.passage(lm.pad_id), block_matrices(lm)).values()
    with torch.no_grad():
        alone = [float(reply_loss(lm, kept.batch(lm, [row]))) for row in range(3)]
    assert each == pytest.approx(alone, abs=1e-4)
    own = own_replies(lm, case.report.positives.first(1), 14)
    assert lm.decode(own.rows[0].tokens[own.starts[0] :]) == "i cannot help with that ."
    assert own.rows[0].tokens[-1] in lm.eos_ids


def test_every_row_is_drawn_before_any_comes_again():
    order = draws(7, 3, seed=1)
    rows = [row for _ in range(7) for row in next(order)]
    assert [sorted(rows[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert sorted(next(draws(3, 8, seed=0))) == [0, 1, 2]


def test_a_perturbation_keeps_its_bound_and_brings_the_behaviour_nearer(lm, case):
    with mitigated(lm, case, "orthogonalize", SETTINGS), torch.no_grad():
        shown = case.shown.batch(lm, range(4))
        width = max(case.shown.starts[:4])
        moved = perturbation(lm, shown, 1, width, 0.3, 3)
        acts = residual(lm, shown, 1)[:, :width]
        inside = shown.tokens.mask[:, :width] & ~shown.replies[:, :width]
        inside[:, 0] = False
        bound = 0.3 * acts[inside].norm(dim=-1).mean()
        assert moved.norm(dim=-1).max() <= bound * 1.0001
        assert not moved[~inside].any()
        plain = float(reply_loss(lm, shown))
        with added(lm, 1, moved):
            assert float(reply_loss(lm, shown)) < plain - 1
        assert float(reply_loss(lm, shown)) == plain


def test_the_chooser_prefers_effect_then_least_cost_and_never_exceeds_the_budget(lm):
    class Fake:
        """A gauge that is told what it measures."""

        def kl(self, lm):
            return self.now[0]

        def margin(self, lm):
            return 0.0

        def outcome(self, lm):
            restored = self.now[1]
            return type("O", (), {"share": lambda _, verdict: restored if verdict.value == "alternative" else 0.0})()

    gauge = Fake()
    with put_back(lm) as before:
        gauge.now = (0.0, 0.1)
        chooser = Chooser(lm, gauge, 0.05, before)
        name = next(iter(before))
        for number, now in enumerate(
            [(0.01, 0.05), (0.04, 0.9), (0.02, 0.9), (0.03, 0.9), (0.06, 1.0), (math.nan, 1.0)]
        ):
            gauge.now = now
            put(lm, {name: torch.full_like(before[name], float(number))})
            chooser.offer({"number": number})
        assert chooser.take().dose == {"number": 2}
        assert bool((plain_parameters(lm)[name] == 2).all())


def test_what_the_user_gets_wrong_is_said(lm, case, tied, tmp_path):
    with pytest.raises(UserError, match="unknown mitigation 'prone'"), mitigated(lm, case, "prone"):
        pass
    with pytest.raises(UserError, match="there are no values for"), mitigated(lm, case, "prune", scores={}):
        pass
    wrong = {matrix.name: torch.zeros(2, 2) for matrix in block_matrices(lm)}
    with pytest.raises(UserError, match="but values of"), mitigated(lm, case, "prune", reference=wrong):
        pass
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"a.safetensors, b.safetensors for scores"):
        read_scores(tmp_path)
    assert list(read_scores(tmp_path / "a.safetensors")) == ["x"]
    located = tmp_path / "taylor-parameter-s0.safetensors"  # as `sae localize localize.save_weights=true` writes them
    write_tensors(located, {"taylor/x": torch.ones(1), "taylor_difference/x": torch.zeros(1)})
    assert float(read_scores(f"{located}:taylor_difference")["x"]) == 0
    assert list(read_scores(f"{located}:taylor")) == ["x"]
    for given in (located, f"{located}:snip", f"{tmp_path / 'a.safetensors'}:snip"):
        with pytest.raises(UserError, match="say which"):
            read_scores(given)
    with pytest.raises(UserError, match="is no parameter of"):
        put(lm, {"nothing": torch.zeros(1)})
    with pytest.raises(UserError, match="ascending"):
        MitigationSettings(fractions=(0.1, 0.01))
    bad = next(iter(plain_parameters(lm).values()))
    with put_back(lm), pytest.raises(UserError, match="the loss became nan"):
        descend(lm, lambda step: bad.sum() * math.nan, 2, 1e-3, after=lambda step: True)
    half = load_lm(str(tied.folder), device="cpu", dtype="bfloat16")
    with pytest.raises(UserError, match=r"lm.dtype=float32"):
        check_trainable(half)
    assert first_words("I'm sorry, but no", 2) == "I'm sorry,"
    assert first_words("never", 2) == "never"
    assert first_words("not now", 2) == "not"
