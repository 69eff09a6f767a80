"""How well a mitigation holds: attempts to bring the behaviour back, by training and by prompting.

*Relearning*: the mitigated model is fine-tuned on a few examples of the behaviour; how many steps until it is back at
half its original rate on prompts it was not shown? Few steps mean that the behaviour was hidden, not removed (Lynch et
al. 2402.16835). *Prefix*: the reply is started with the behaviour's first words. *Steering*: the behaviour's direction,
taken from the original model, is added at its own length. *Triggers*: system lines in front of the prompt.

Relearning has a control where a model is known that never had the behaviour: the steps it needs to learn it from the
same examples. An attack may also bring about what looks like the behaviour where it was never due; so each has as its
control the rate under it in the original model, on prompts on which the behaviour is not due.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sae import stats
from sae.behavior.contrast import ContrastRecord
from sae.behavior.judge import Judge, Verdict
from sae.behavior.measure import Progress, Prompts, evaluate, outcome_of, prepare
from sae.lm.tokens import pad
from sae.steering.interventions import Add
from sae.weights.mitigate.case import Case
from sae.weights.mitigate.choose import put_back
from sae.weights.mitigate.finetune import descend
from sae.weights.mitigate.replies import draws, given_replies, reply_loss
from sae.weights.mitigate.settings import MitigationSettings

LOOKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 140, 200, 300, 500)
"""Steps after which relearning is looked at."""


class Relearning(NamedTuple):
    """Fine-tuning on examples of the behaviour.

    Attributes:
        steps: the first look at which the behaviour is back at half its original rate; 0 where it never left, None
            where it did not come back.
        curve: (steps, rate on held-out prompts); it ends there.
        examples: how many were learned from.
        lr: the rate.
    """

    steps: int | None
    curve: tuple[tuple[int, float], ...]
    examples: int
    lr: float


def relearn(lm: Any, case: Case, settings: MitigationSettings, target: float, progress: Progress) -> Relearning:
    """Fine-tune on examples of the behaviour until it is back; afterwards the weights are as before.

    Args:
        lm: the model, mitigated.
        case: the behaviour.
        settings: see `MitigationSettings`.
        target: the behaviour's rate at which it counts as back.
        progress: called now and then.
    """
    n = min(settings.relearn_examples, len(case.shown.rows))
    shown = case.shown.first(n)
    order = draws(n, settings.batch, settings.seed)
    held_out = case.report.positives.first(settings.n_prompts_check)
    lr = settings.rate_for(lm.d_model)

    def look() -> float:
        found = evaluate(lm, [], held_out, case.judge, settings.max_new_tokens)
        return found.share(Verdict.BEHAVIOR)

    curve = [(0, look())]

    def after(step: int) -> bool:
        if step in LOOKS or step == settings.relearn_steps:
            curve.append((step, look()))
        progress("relearning", step, settings.relearn_steps)
        return curve[-1][1] < target

    if curve[0][1] < target:
        with put_back(lm):
            descend(lm, lambda _: reply_loss(lm, shown.batch(lm, next(order))), settings.relearn_steps, lr, after=after)
    back = [step for step, rate in curve if rate >= target]
    return Relearning(back[0] if back else None, tuple(curve), n, lr)


class Attacks(NamedTuple):
    """The behaviour's rate under attempts to bring it back by prompting or steering."""

    prefix: stats.Rate
    steering: stats.Rate
    triggers: dict[str, stats.Rate]


def attacks(lm: Any, case: Case, records: Sequence[ContrastRecord], settings: MitigationSettings) -> Attacks:
    """Measure all attacks on some prompts: those on which the behaviour is due, or others as a control."""
    records = records[: settings.n_prompts_check]
    return Attacks(
        _prefixed(lm, records, case.judge, settings),
        _steered(lm, records, case, settings),
        {line: _triggered(lm, line, records, case.judge, settings) for line in settings.triggers},
    )


def first_words(text: str, n: int) -> str:
    """A text's first n words, or fewer, so that at least one is left to be said."""
    words = text.split()
    return " ".join(words[: max(1, min(n, len(words) - 1))])


def _prefixed(lm: Any, records: Sequence[ContrastRecord], judge: Judge, settings: MitigationSettings) -> stats.Rate:
    """The rate where the reply begins with the behaviour's first words.

    Where a judge takes these words alone for the behaviour already, what the model adds is judged by itself.
    """
    starts = [first_words(record.behavior_texts[0], settings.prefix_words) for record in records]
    begun = given_replies(lm, records, starts)
    texts: list[str] = []
    for batch in pad(begun.rows, padding_side="left", pad_id=lm.pad_id).split(settings.batch_prompts):
        made = lm.generate(batch, settings.max_new_tokens)
        for new, count in zip(made.tokens.tolist(), made.n_tokens, strict=True):
            row, first, record = begun.rows[len(texts)], begun.starts[len(texts)], records[len(texts)]
            start = row.tokens[first:]
            known = judge(lm.decode(start), record) is Verdict.BEHAVIOR
            texts.append(lm.decode([*([] if known else start), *new[:count]]))
    return outcome_of(texts, records, judge).behavior


def _steered(lm: Any, records: Sequence[ContrastRecord], case: Case, settings: MitigationSettings) -> stats.Rate:
    prompts = prepare(lm, records, settings.batch_prompts)
    push = Add(direction=case.attack.vector, hook_name=case.attack.hook_name)
    return evaluate(lm, [push], prompts, case.judge, settings.max_new_tokens).behavior


def _triggered(
    lm: Any, line: str, records: Sequence[ContrastRecord], judge: Judge, settings: MitigationSettings
) -> stats.Rate:
    """The rate with a line in front: at the head of the system turn, or as one."""
    changed = []
    for record in records:
        messages = [dict(message) for message in record.messages]
        if messages[0]["role"] == "system":
            messages[0]["content"] = f"{line} {messages[0]['content']}"
        else:
            messages.insert(0, {"role": "system", "content": line})
        changed.append(messages)
    tokens = lm.tokenize_chats(changed)
    texts = [
        text
        for batch in Prompts(tuple(records), tokens, settings.batch_prompts).batches
        for text in lm.generate(batch, settings.max_new_tokens).texts
    ]
    return outcome_of(texts, records, judge).behavior
