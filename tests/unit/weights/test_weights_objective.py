"""Objectives are what they say, their gradients are right, and nothing is left behind in the model."""

import pytest
import torch
from tiny_lms import save_checkpoint

import sae
from sae.behavior.contrast import load_contrast
from sae.behavior.cost import own_replies
from sae.behavior.measure import margins, prepare, prepare_margins
from sae.errors import UserError
from sae.lm.matrices import block_matrices
from sae.weights.objective import margin_objective, passage_of, reply_objective, text_passage


def contrast(n=6):
    return load_contrast(
        [
            {
                "messages": [{"role": "user", "content": f"do {'harm' if i % 2 else 'good'} {i}" + "!" * i}],
                "label": i % 2, "topic": f"t{i}", "behavior_texts": ["no", "sorry"], "alternative_texts": ["yes"],
            }
            for i in range(n)
        ],
        "refusal",
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "helium"])
def lm(request, tmp_path_factory):
    return sae.load_lm(str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


def total(objective):
    found = {one.name: torch.zeros_like(one.parameter) for one in objective.matrices}
    values = objective.gradients(lambda one, gradient: found[one.name].add_(gradient))
    return found, values


def test_values_are_the_margins_and_the_gradient_is_their_slope(lm):
    matrices = block_matrices(lm)
    records = contrast().records
    objective = margin_objective(lm, records, matrices, batch_prompts=4)
    before = objective.values()
    assert before == pytest.approx(margins(lm, prepare_margins(lm, records)), abs=1e-4)
    gradient, values = total(objective)
    assert values == pytest.approx(before, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    step = {
        one.name: torch.randn(one.parameter.shape, generator=generator) * one.parameter.detach().std()
        for one in matrices
    }
    kept = {one.name: one.parameter.detach().clone() for one in matrices}
    ends, size = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            for one in matrices:
                one.parameter.copy_(kept[one.name] + sign * size * step[one.name])
        ends.append(objective.values().mean())
    with torch.no_grad():
        for one in matrices:
            one.parameter.copy_(kept[one.name])
    slope = sum(float((gradient[name] * step[name]).sum()) for name in gradient)
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=0.03, abs=0.02)
    assert objective.evaluations == 1 + 3 + 2


def test_only_one_gradient_is_alive_at_a_time_and_none_stays(lm):
    matrices = block_matrices(lm)
    parameters = list(lm.bridge.original_model.parameters())
    flags = [one.requires_grad for one in parameters]
    mine = torch.ones_like(parameters[0])
    parameters[0].grad = mine
    seen = []

    def receive(one, gradient):
        assert all(other.grad is None for other in parameters)
        seen.append(one.name)

    margin_objective(lm, contrast().records, matrices[1:]).gradients(receive)
    assert sorted(seen) == sorted(one.name for one in matrices[1:])
    assert [one.requires_grad for one in parameters] == flags
    assert parameters[0].grad is mine
    parameters[0].grad = None


def test_prompts_gradients_average_to_the_gradient(lm):
    objective = margin_objective(lm, contrast().records, block_matrices(lm))
    whole, _ = total(objective)
    mean = {name: torch.zeros_like(values) for name, values in whole.items()}
    objective.prompt_gradients(lambda one, gradient, row: mean[one.name].add_(gradient / len(objective)))
    for name, values in whole.items():
        torch.testing.assert_close(mean[name], values, rtol=1e-3, atol=1e-5)


def test_replies_cost_their_cross_entropy(lm):
    task = own_replies(lm, prepare(lm, contrast().records), 4)
    passage = passage_of(task, lm.pad_id)
    found = reply_objective(lm, passage, block_matrices(lm), batch_prompts=4).values()
    expected = []
    for row, count in zip(passage.tokens.rows(), passage.n_predicted, strict=True):
        ids = torch.tensor([row.tokens])
        batch = passage.tokens._replace(tokens=ids, mask=ids >= 0, roles=torch.tensor([row.roles]).to(torch.uint8))
        logprobs = lm.logits(batch)[0].float().log_softmax(dim=-1)
        picked = logprobs[:-1].gather(1, ids[0, 1:, None])[-count:]
        expected.append(float(-picked.mean()))
    assert found == pytest.approx(expected, abs=1e-4)
    text = text_passage([lm.tokenize(["hello there", "you"])], lm.pad_id)
    assert text.n_predicted == tuple(len(row.tokens) - 1 for row in text.tokens.rows())


def test_no_prompts_are_refused(lm):
    with pytest.raises(UserError, match="no prompts"):
        margin_objective(lm, [], block_matrices(lm))


def test_a_gradient_that_does_not_arrive_is_refused(toy):
    objective = toy.quadratic()
    objective.matrices = [
        *toy.matrices,
        toy.matrices[0]._replace(name="other", parameter=torch.nn.Parameter(torch.ones(2, 2))),
    ]
    with pytest.raises(UserError, match="no gradient reaches 'other'"):
        objective.gradients(lambda one, gradient: None)


def test_a_backward_keeps_no_more_activations_than_it_may(toy, lm, monkeypatch):
    # The toy keeps a token's input (4 numbers), and its outputs (3) for the square.
    assert toy.quadratic()._activations(0) == 4 * (4 + 3)
    records, matrices = contrast().records, block_matrices(lm)
    whole = total(margin_objective(lm, records, matrices))
    one = margin_objective(lm, records, matrices)
    size = one._activations(len(records) - 1)  # the longest
    for allowed, rows in ((5 * size // 2, 2), (size // 2, 1), (100 * size, len(records))):
        monkeypatch.setattr("sae.weights.objective.SMALL", allowed)
        monkeypatch.setattr("sae.weights.objective.ACTIVATIONS", 0.0)
        objective = margin_objective(lm, records, matrices)
        ran = []
        forward = objective.read
        objective.read = lambda logits, rows, forward=forward, ran=ran: ran.append(len(rows)) or forward(logits, rows)
        gradient, values = total(objective)
        assert ran[1:] == [rows] * (len(records) // rows)  # the first is the one that was counted
        assert values == pytest.approx(whole[1], abs=1e-4)
        for name, expected in whole[0].items():
            torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=1e-5)
        assert objective.evaluations == 3
