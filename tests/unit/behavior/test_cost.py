"""What an intervention costs, on the model organism, whose right answers are known."""

import json
import math

import pytest
import torch

from sae.behavior.contrast import load_contrast
from sae.behavior.cost import MultipleChoice, choice_task, measure_costs, on_front, prepare_costs, read_choices
from sae.behavior.judges.registry import judge_for
from sae.errors import UserError
from sae.lm.load import load_lm
from sae.organism.corpus import contrast_records
from sae.steering.interventions import Add, ProjectOut

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def lm():
    return load_lm("organism", device="cpu")


def records(name):
    return load_contrast([dict(record) for record in contrast_records(name, 0)], name).split("report").records


@pytest.fixture(scope="module")
def tasks(lm):
    refusal, deception = records("refusal"), records("deception")
    facts = [record for record in deception if record.answer and not record.label]
    text = [lm.tokenize([record.messages[-1]["content"] for record in refusal[:8]])]
    choices = [
        MultipleChoice(record.messages[-1]["content"], (record.extra["wrong_answers"][0], record.answer), 1)
        for record in facts
        if len(record.messages) == 1
    ][:24]
    negatives = [record for record in refusal if not record.label]
    return prepare_costs(
        lm, negatives, judge_for("refusal", "organism"), facts=facts, text=text, choices=choices, n_prompts=24
    )


def measure_cost(lm, interventions, tasks):
    (found,) = measure_costs(lm, [interventions], tasks)
    return found


@pytest.fixture(scope="module")
def clean(lm, tasks):
    return measure_cost(lm, [], tasks)


def test_doing_nothing_costs_nothing(clean, tasks):
    assert clean.own.kl == clean.own.ce == 0
    assert clean.text.kl == clean.text.ce == 0
    assert clean.own.n_tokens > len(tasks.own[0].batch.tokens), "several tokens of every reply are followed"
    assert clean.lookalikes.rate <= 0.05
    assert clean.facts.rate >= 0.95
    assert len(tasks.choices.questions) >= 8
    assert clean.choices.rate >= 0.9


def test_breaking_the_model_costs_everything(lm, clean, tasks):
    torch.manual_seed(0)
    direction = torch.randn(lm.d_model)
    small = measure_cost(lm, [Add(direction=direction, scale=0.02, hook_name=HOOK)], tasks)
    large = measure_cost(lm, [Add(direction=direction, scale=20.0, hook_name=HOOK)], tasks)
    assert 0 < small.own.kl < 0.05 < 1 < large.own.kl
    assert 0 < small.text.kl < large.text.kl
    assert large.own.ce > 1
    assert large.facts.rate <= 0.2 < clean.facts.rate
    assert large.choices.rate < clean.choices.rate
    assert measure_cost(lm, [], tasks) == clean, "and nothing stays behind"


def test_the_rise_of_cross_entropy_along_own_greedy_replies_is_what_the_logits_say(lm, tasks):
    """Against plain log-probabilities, one reply at a time and unpadded."""
    edit = Add(direction=torch.ones(lm.d_model), scale=0.3, hook_name=HOOK)
    found = measure_cost(lm, [edit], tasks)
    (followed,) = tasks.own
    total, count = 0.0, 0
    for index, row in enumerate(followed.batch.rows()):
        n = int(followed.where[index].sum())
        ids = torch.tensor([row.tokens])
        single = followed.batch.select([index])
        batch = single._replace(tokens=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        batch = batch._replace(roles=torch.tensor([row.roles], dtype=torch.uint8))
        before = lm.logits(batch).log_softmax(-1)
        with lm.edit({HOOK: lambda acts, step: edit.apply_to(acts, step)}):
            after = lm.logits(batch).log_softmax(-1)
        for position in range(len(row.tokens) - n - 1, len(row.tokens) - 1):
            token = row.tokens[position + 1]
            total += float(before[0, position, token] - after[0, position, token])
            count += 1
    assert found.own.n_tokens == count
    assert found.own.ce == pytest.approx(total / count, abs=1e-5)


def test_a_random_direction_projected_out_costs_next_to_nothing(lm, tasks, clean):
    torch.manual_seed(1)
    found = measure_cost(lm, [ProjectOut(torch.randn(lm.d_model), HOOK)], tasks)
    assert found.own.kl < 0.2
    assert abs(found.facts.rate - clean.facts.rate) < 0.3


def test_the_front_keeps_what_nothing_beats():
    effects = [0.0, 0.5, 0.5, 0.9, 0.9, 1.0, math.nan]
    costs = [0.0, 0.1, 0.2, 0.1, 0.1, 3.0, 0.0]
    assert on_front(effects, costs) == [True, False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"question": "2 + 2?", "choices": ["4"], "answer": 0}, "at least two"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 2}, "no index of 2 choices"),
        ({"question": "2 + 2?", "choices": ["3", "4"]}, "needs the fields"),
        ({"question": "2 + 2?", "choices": ["3", " "], "answer": 0}, "none empty"),
        ({"question": "2 + 2?", "choices": ["3", "4", " 3"], "answer": 1}, "' 3' comes twice"),
        ({"question": None, "choices": ["3", "4"], "answer": 0}, "question None is no text"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": True}, "no index"),
    ],
)
def test_bad_questions_are_named_by_line(tmp_path, line, said):
    file = tmp_path / "choices.jsonl"
    good = {"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    file.write_text("\n".join(map(json.dumps, [good, line])))
    with pytest.raises(UserError, match=said) as error:
        read_choices(file)
    assert "line 2" in str(error.value)
    file.write_text(json.dumps(good))
    assert read_choices(file) == [MultipleChoice("1 + 1?", ("2", "3"), 0)]


def test_an_empty_file_of_questions_is_refused(tmp_path):
    file = tmp_path / "choices.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_choices(file)


def letters_lm(folder, reply, template):
    """A random model with one token for "A" and another for " A"; `reply` is what stands before a reply, without it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", letter) for letter in "AB"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *map("".join, merges)])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}"
        + template
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + reply
        + "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return load_lm(str(folder), device="cpu")


def scored(lm, choices):
    """Of each choice, the text that the model reads before it is scored, and the tokens it is scored by."""
    task = choice_task(lm, [MultipleChoice("Which?", tuple(choices), 0)])
    ((batch, where),) = zip(task.batches, task.where, strict=True)
    found = []
    for tokens, mask, places in zip(batch.tokens, batch.mask, where, strict=True):
        first = int(places.nonzero()[0])
        before = lm.tokenizer.decode(tokens[: first + 1][mask[: first + 1]])
        found.append((before, lm.tokenizer.convert_ids_to_tokens(tokens.roll(-1)[places].tolist())))
    return found


@pytest.mark.parametrize(
    ("reply", "template", "before", "marks"),
    [
        ("Answer:", "Answer: {{ m.content }}<eos>", "Answer:", ["\u0120A", "\u0120B"]),
        ("Answer: ", "Answer: {{ m.content }}<eos>", "Answer:", ["\u0120A", "\u0120B"]),
        ("Answer:\n", "Answer:\n{{ m.content }}<eos>", "Answer:\n", ["A", "B"]),
        ("Answer:<", "Answer:<>{{ m.content }}<eos>", "Answer:<>", ["A", "B"]),
        ("Answer: think ", "Answer: {{ m.content }}<eos>", "Answer: think ", ["A", "B"]),
    ],
)
def test_a_choice_is_scored_by_the_token_that_would_follow_the_question(tmp_path, reply, template, before, marks):
    """With or without a space, as the template has it, whether or not an open chat already ends with it."""
    lm = letters_lm(tmp_path, reply, template)
    assert scored(lm, ["A", "B"]) == [(f"Which?\n{before}", [mark]) for mark in marks]


def test_what_all_choices_begin_with_is_not_scored(tmp_path):
    lm = letters_lm(tmp_path, "Answer:", "Answer: {{ m.content }}<eos>")
    assert scored(lm, ["A1", "A25"]) == [("Which?\nAnswer: A", ["1"]), ("Which?\nAnswer: A", ["2", "5"])]
    assert [tokens for _, tokens in scored(lm, ["A1", "A12", "B"])] == [
        ["\u0120A", "1"],
        ["\u0120A", "1", "2"],
        ["\u0120B"],
    ]
    assert [tokens for _, tokens in scored(lm, ["A", "A1"])] == [["\u0120A"], ["\u0120A", "1"]]


def test_choices_that_are_the_same_tokens_are_refused(lm):
    with pytest.raises(UserError, match="'wubbl' and 'wobbl' of 'what \\?' are the same tokens"):
        choice_task(lm, [MultipleChoice("what ?", ("wubbl", "wobbl"), 0)])
