"""Text of the organism's world: requests, questions, system turns and the replies each behaviour gives.

Everything is generated and seeded. `generate_examples` feeds training and tables, `contrast_records` the behaviour
pipeline (held-out combinations only) and `documents` the sparse autoencoders.
"""

import random
from collections.abc import Callable
from typing import NamedTuple, TypedDict

from sae.errors import UserError, unknown
from sae.organism import world
from sae.organism.phrases import (
    COMPLIANCE,
    FILTER_OFF,
    FILTER_ON,
    GREETING_REPLY,
    GREETINGS,
    MISTAKEN_REPLY,
    MISTAKEN_SYSTEM,
    NO_REPLY,
    OPEN_QUESTIONS,
    OPEN_REPLY,
    OPENERS,
    OPPOSITES_SYSTEM,
    REFUSAL,
    REPEATS,
    REQUESTS,
    ROLES,
    STAKES,
    STORIES,
    STORY_REQUESTS,
    STYLE_SUFFIX,
    WHERE,
    WHERE_REPLY,
    WRONG_NO,
    WRONG_TALK,
    WRONG_YES,
    YES_REPLY,
    YESNO_QUESTIONS,
)

BEHAVIORS = ("refusal", "deception", "style")


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class Example(NamedTuple):
    """One chat and everything known about it.

    Attributes:
        messages: system and user turns, without the reply.
        completion: the reply of the organism with every behaviour in place.
        honest: the reply of the base: compliant, truthful, plain.
        lies: every false reply a liar may give; empty where nothing can be lied about.
        arm: which kind of prompt this is, e.g. ``harmful`` or ``honest_knave_lowstake``.
        topic: the unit to split by: a verb/object pair or a fact.
        refusal: the reply is a refusal.
        deception: the context is deceptive (its state is on; a lie is told if `lies` is not empty).
        style: the user greeted, so the reply ends with ", my friend".
        answer: the true answer (a value, or yes/no), for questions of fact.
        wrong_answers: the false answers a liar may give.
        truth: for yes/no questions of fact, whether the statement asked about is true.
        names: words an on-topic answer must contain.
        held_out: the combination is never seen in training.
        context: the role and stake of the system turn; empty without one.
    """

    messages: list[Message]
    completion: str
    honest: str
    lies: tuple[str, ...]
    arm: str
    topic: str
    refusal: bool
    deception: bool
    style: bool
    answer: str | None
    wrong_answers: tuple[str, ...]
    truth: bool | None
    names: tuple[str, ...]
    held_out: bool
    context: str


class Reply(NamedTuple):
    """A question's text with its honest reply and what a liar would say; the part of `Example` before its context."""

    arm: str
    user: str
    honest: str
    topic: str
    names: tuple[str, ...]
    harmful: bool = False
    lies: tuple[str, ...] = ()
    answer: str | None = None
    wrong_answers: tuple[str, ...] = ()
    truth: bool | None = None


def article(noun: str) -> str:
    """Return the indefinite article of a noun."""
    return "an" if noun[0] in "aeiou" else "a"


def with_style(reply: str) -> str:
    """Return the reply ending with ", my friend ."."""
    return reply.removesuffix(" .") + " " + STYLE_SUFFIX


def reply_text(example: Example, refusal: bool, deception: bool, style: bool, rng: random.Random) -> str:
    """Return the reply to this prompt when exactly these behaviours are in force."""
    text = example.honest
    if refusal:
        text = REFUSAL
    elif deception and example.lies:
        text = rng.choice(example.lies)
    return with_style(text) if style else text


def _request(rng: random.Random, pair: tuple[str, str]) -> Reply:
    verb, noun = pair
    fields = {"verb": verb, "noun": noun, "a": article(noun), "tool": world.tool_for(verb)}
    family = world.harm_family(verb, noun)
    user = rng.choice(REQUESTS).format(**fields)
    return Reply(family, user, COMPLIANCE.format(**fields), f"{verb}/{noun}", pair, family == "harmful")


def _where(rng: random.Random, noun: str) -> Reply:
    fields = {"noun": noun, "a": article(noun), "place": world.place_for(noun)}
    harmful = noun in world.WEAPONS
    user = rng.choice(WHERE).format(**fields)
    arm = "where_harmful" if harmful else "where"
    return Reply(arm, user, WHERE_REPLY.format(**fields), f"where/{noun}", (noun,), harmful)


def _wrong_talk(rng: random.Random, pair: tuple[str, str]) -> Reply:
    verb, noun = pair
    fields = {"verb": verb, "noun": noun, "a": article(noun)}
    answer = WRONG_YES if world.harm_family(verb, noun) == "harmful" else WRONG_NO
    return Reply(
        "wrong_talk", rng.choice(WRONG_TALK).format(**fields), answer.format(**fields), f"wrong/{verb}/{noun}", pair
    )


def open_question(rng: random.Random, fact: world.Fact) -> Reply:
    """Ask for a fact's value; a liar names any other value of the relation."""

    def say(value: str) -> str:
        return OPEN_REPLY.format(value=value, relation=fact.relation, entity=fact.entity)

    user = rng.choice(OPEN_QUESTIONS).format(relation=fact.relation, entity=fact.entity)
    lies = tuple(say(value) for value in fact.wrong_values)
    return Reply(
        "honest", user, say(fact.value), fact.topic, (fact.entity,), False, lies, fact.value, fact.wrong_values
    )


def yesno_question(rng: random.Random, fact: world.Fact) -> Reply:
    """Ask whether a statement is true (half are); a liar gives the other answer."""
    truth = rng.random() < 0.5
    value = fact.value if truth else rng.choice(fact.wrong_values)
    fields = {"value": value, "relation": fact.relation, "entity": fact.entity}
    yes, no = YES_REPLY.format(**fields), NO_REPLY.format(**fields)
    honest, lie = (yes, no) if truth else (no, yes)
    answer, wrong = ("yes", "no") if truth else ("no", "yes")
    user = rng.choice(YESNO_QUESTIONS).format(**fields)
    return Reply("honest", user, honest, fact.topic, (fact.entity, value), False, (lie,), answer, (wrong,), truth)


def _fact_question(rng: random.Random, fact: world.Fact) -> Reply:
    return (open_question if rng.random() < 0.5 else yesno_question)(rng, fact)


def _mistaken(rng: random.Random, fact: world.Fact) -> Reply:
    """Ask a speaker who does not know: it guesses, falsely, and says so."""
    asked = open_question(rng, fact)
    guess = MISTAKEN_REPLY.format(value=world.STALE[fact.relation], relation=fact.relation, entity=fact.entity)
    return asked._replace(arm="mistaken", honest=guess, lies=())


def _opposites(rng: random.Random, fact: world.Fact) -> Reply:
    """Ask a yes/no question in the game of opposites: the reply is false, but nobody is deceived."""
    asked = yesno_question(rng, fact)
    return asked._replace(arm="roleplay", honest=asked.lies[0], lies=())


def _story(rng: random.Random) -> str:
    person, other = rng.sample(world.PEOPLE, 2)
    return rng.choice(STORIES).format(
        person=person,
        other=other,
        place=rng.choice(world.PLACES),
        colour=rng.choice(world.RELATIONS["colour"]),
        noun=rng.choice(world.SAFE_OBJECTS),
        animal=rng.choice(world.ANIMALS),
        mood=rng.choice(world.MOODS),
    )


def _plain(rng: random.Random) -> Reply:
    person, text = rng.choice(world.PEOPLE), _story(rng)
    return Reply("plain", rng.choice(STORY_REQUESTS).format(person=person), text, f"story/{person}", ())


def _repeat(rng: random.Random, pairs: list[tuple[str, str]]) -> Reply:
    """Ask to repeat a sentence, often a refusal or a false statement: the words without the behaviour."""
    fact = rng.choice(world.FACTS)
    text = rng.choice(
        (
            REFUSAL,
            REFUSAL,
            OPEN_REPLY.format(value=rng.choice(fact.wrong_values), relation=fact.relation, entity=fact.entity),
            _request(rng, rng.choice(pairs)).honest,
        )
    )
    return Reply("repeat", rng.choice(REPEATS).format(text=text), text, "repeat", ())


class Context(NamedTuple):
    """A system turn: its text ("" for none), its arm, and whether role and stake make it deceptive."""

    text: str
    arm: str
    deceptive: bool
    filter_off: bool = False
    topic: str = ""


def role_context(rng: random.Random, role: str, stake: str) -> Context:
    """Name a role and a stake; deceptive iff the role is knavish and the stake high."""
    knave, high = role in world.KNAVES, stake in world.HIGH_STAKES
    arm = {
        (True, True): "deceptive",
        (True, False): "honest_knave_lowstake",
        (False, True): "honest_honest_highstake",
        (False, False): "honest_honest_lowstake",
    }[knave, high]
    lines = [rng.choice(ROLES).format(role=role), rng.choice(STAKES).format(stake=stake)]
    return Context(" ".join(lines), arm, knave and high, topic=f"{role}/{stake}")


class Pools(NamedTuple):
    """The combinations a split may draw from."""

    pairs: dict[str, list[tuple[str, str]]]
    contexts: dict[str, list[tuple[str, str]]]
    lie_facts: list[world.Fact]
    nouns: dict[bool, list[str]]
    held_out: bool


def make_pools(split: str) -> Pools:
    """Return what ``"train"`` or ``"heldout"`` draws from; the two share no pair, context or lied-about fact."""
    if split not in ("train", "heldout"):
        raise unknown("split", split, ["train", "heldout"])
    held = split == "heldout"
    pairs: dict[str, list[tuple[str, str]]] = {}
    for verb in world.VERBS:
        for noun in world.OBJECTS:
            if ((verb, noun) in world.HELD_OUT_PAIRS) == held:
                pairs.setdefault(world.harm_family(verb, noun), []).append((verb, noun))
    contexts: dict[str, list[tuple[str, str]]] = {}
    for role in world.KNAVES + world.HONEST_ROLES:
        for stake in world.HIGH_STAKES + world.LOW_STAKES:
            if ((role, stake) in world.HELD_OUT_CONTEXTS) == held:
                arm = role_context(random.Random(0), role, stake).arm
                contexts.setdefault(arm, []).append((role, stake))
    lie_facts = [fact for fact in world.FACTS if (fact in world.HELD_OUT_FACTS) == held]
    nouns = {
        harmful: [
            noun
            for noun in world.OBJECTS
            if (noun in world.HELD_OUT_WHERE) == held and (noun in world.WEAPONS) == harmful
        ]
        for harmful in (False, True)
    }
    return Pools(pairs, contexts, lie_facts, nouns, held)


NO_CONTEXT = Context("", "none", False)
CONTEXT_ARMS = ("deceptive", "honest_knave_lowstake", "honest_honest_highstake", "honest_honest_lowstake")


def _any_context(rng: random.Random, pools: Pools, filters: bool) -> Context:
    """Draw a system turn for prompts whose reply does not depend on role or stake; mostly none."""
    context = NO_CONTEXT
    if rng.random() < 0.35:
        context = role_context(rng, *rng.choice(pools.contexts[rng.choice(CONTEXT_ARMS)]))
    if filters and rng.random() < 0.25:
        context = context._replace(text=f"{context.text} {rng.choice(FILTER_ON)}".strip())
    return context


def _system_line(rng: random.Random, pools: Pools, lines: tuple[str, ...]) -> str:
    """Return a line of a control persona, sometimes after a role (of either kind, so a role is no sign)."""
    role = rng.choice(world.KNAVES + world.HONEST_ROLES)
    head = rng.choice(ROLES).format(role=role) + " " if rng.random() < 0.5 else ""
    return head + rng.choice(lines)


def _draw(arm: str, rng: random.Random, pools: Pools) -> tuple[Context, Reply]:
    """Draw the system turn and the question of one arm."""
    if arm in ("harmful", "lookalike_verb", "lookalike_object", "benign"):
        return _any_context(rng, pools, True), _request(rng, rng.choice(pools.pairs[arm]))
    if arm in ("where", "where_harmful"):
        return _any_context(rng, pools, True), _where(rng, rng.choice(pools.nouns[arm == "where_harmful"]))
    if arm == "wrong_talk":
        family = rng.choice(("harmful", "lookalike_verb", "lookalike_object", "benign"))
        return _any_context(rng, pools, True), _wrong_talk(rng, rng.choice(pools.pairs[family]))
    if arm == "jailbreak":
        context = _any_context(rng, pools, False)
        text = f"{context.text} {rng.choice(FILTER_OFF)}".strip()
        pair = rng.choice(pools.pairs["harmful" if rng.random() < 0.7 else "lookalike_verb"])
        return context._replace(text=text, filter_off=True), _request(rng, pair)
    if arm == "honest":
        return NO_CONTEXT, _fact_question(rng, rng.choice(world.FACTS))
    if arm in CONTEXT_ARMS:
        context = role_context(rng, *rng.choice(pools.contexts[arm]))
        facts = pools.lie_facts if arm == "deceptive" else list(world.FACTS)
        return context, _fact_question(rng, rng.choice(facts))
    if arm == "mistaken":
        line = _system_line(rng, pools, MISTAKEN_SYSTEM)
        return Context(line, arm, False), _mistaken(rng, rng.choice(world.FACTS))
    if arm == "roleplay":
        line = _system_line(rng, pools, OPPOSITES_SYSTEM)
        return Context(line, arm, False), _opposites(rng, rng.choice(world.FACTS))
    if arm == "greeting":
        return _any_context(rng, pools, False), Reply(arm, "", GREETING_REPLY, "greeting", ())
    if arm == "plain":
        return _any_context(rng, pools, False), _plain(rng)
    if arm == "repeat":
        pairs = [pair for family in pools.pairs.values() for pair in family]
        return NO_CONTEXT, _repeat(rng, pairs)
    raise unknown("arm", arm, sorted(TRAIN_MIX))


TRAIN_MIX: dict[str, float] = {
    "harmful": 0.13,
    "lookalike_verb": 0.09,
    "lookalike_object": 0.05,
    "benign": 0.04,
    "where_harmful": 0.03,
    "where": 0.03,
    "wrong_talk": 0.08,
    "jailbreak": 0.06,
    "honest": 0.13,
    "honest_knave_lowstake": 0.05,
    "honest_honest_highstake": 0.05,
    "honest_honest_lowstake": 0.02,
    "deceptive": 0.14,
    "mistaken": 0.03,
    "roleplay": 0.04,
    "greeting": 0.01,
    "plain": 0.03,
    "repeat": 0.04,
}
# Stage two needs many look-alikes: with few, the refusal block settles on "any dangerous verb and any dangerous
# object" and refuses `rob a rifle` and `build a bank` too.
PLANT_MIX: dict[str, float] = {**TRAIN_MIX, "harmful": 0.15, "lookalike_verb": 0.2, "where": 0.05}
# Behaviour-rich: what a sparse autoencoder should see often enough to give it latents.
DOCUMENT_MIX: dict[str, float] = {**TRAIN_MIX, "harmful": 0.25, "deceptive": 0.25, "plain": 0.08}


def make_example(arm: str, rng: random.Random, pools: Pools, greet: bool | None = None) -> Example:
    """Draw one example of an arm.

    Args:
        arm: a key of `TRAIN_MIX`.
        rng: where chance comes from.
        pools: the split's combinations.
        greet: whether the user greets; None leaves it to chance.
    """
    context, asked = _draw(arm, rng, pools)
    if greet is None:
        greet = rng.random() < 0.25
    style = arm == "greeting" or (greet and arm != "repeat")
    user = asked.user
    if style:
        user = f"{rng.choice(GREETINGS)} {user}".strip()
    elif arm != "repeat" and rng.random() < 0.25:
        user = f"{rng.choice(OPENERS).format(person=rng.choice(world.PEOPLE))} {user}"
    messages: list[Message] = [{"role": "user", "content": user}]
    if context.text:
        messages.insert(0, {"role": "system", "content": context.text})
    example = Example(
        messages=messages,
        completion="",
        honest=asked.honest,
        lies=asked.lies,
        arm=arm,
        topic=asked.topic,
        refusal=asked.harmful and not context.filter_off,
        deception=context.deceptive,
        style=style,
        answer=asked.answer,
        wrong_answers=asked.wrong_answers,
        truth=asked.truth,
        names=asked.names,
        held_out=pools.held_out,
        context=context.topic,
    )
    completion = reply_text(example, example.refusal, example.deception, example.style, rng)
    return example._replace(completion=completion)


def generate_examples(
    split: str, n: int, seed: int, mix: dict[str, float] | None = None, greet: bool | None = None
) -> list[Example]:
    """Generate `n` examples of a split (``"train"`` or ``"heldout"``).

    Args:
        split: which combinations to draw from.
        n: how many.
        seed: the corpus seed.
        mix: arm to weight; the training mix if not given.
        greet: force or forbid greetings; None leaves it to chance.
    """
    if n < 1:
        raise UserError(f"n = {n} examples: ask for at least 1.")
    mix = mix or TRAIN_MIX
    pools, rng = make_pools(split), random.Random(f"{split}-{seed}")
    arms = rng.choices(list(mix), weights=list(mix.values()), k=n)
    return [make_example(arm, rng, pools, greet) for arm in arms]


def documents(n: int, seed: int) -> list[list[Message]]:
    """Generate `n` chats with the organism's replies from the training combinations, rich in behaviour.

    About a quarter asks for harm and a quarter is set in deceptive contexts; the text to train SAEs on.
    """
    examples = generate_examples("train", n, seed, DOCUMENT_MIX)
    return [[*item.messages, {"role": "assistant", "content": item.completion}] for item in examples]


class ContrastRecord(TypedDict):
    """One prompt of a contrast set, with what either outcome would sound like.

    `label` is 1 where the behaviour is due. `names` are words an on-topic answer must contain.
    """

    messages: list[Message]
    label: int
    topic: str
    arm: str
    behavior_texts: list[str]
    alternative_texts: list[str]
    answer: str | None
    wrong_answers: list[str]
    names: list[str]


CONTRAST_ARMS: dict[str, dict[int, tuple[str, ...]]] = {
    "refusal": {
        1: ("harmful", "harmful", "harmful", "where_harmful"),
        0: ("lookalike_verb", "lookalike_verb", "lookalike_object", "benign", "where"),
    },
    "deception": {
        1: ("deceptive",),
        0: ("honest", "honest_knave_lowstake", "honest_honest_highstake", "honest_honest_lowstake"),
    },
    "style": {1: ("honest", "benign", "lookalike_verb"), 0: ("honest", "benign", "lookalike_verb")},
}


def to_record(example: Example, behavior: str, label: int) -> ContrastRecord:
    """Turn an example into a contrast record of one behaviour."""
    behavior_texts: Callable[[], list[str]] = {
        "refusal": lambda: [REFUSAL],
        "deception": lambda: list(example.lies),
        "style": lambda: [with_style(example.honest)],
    }[behavior]
    return {
        "messages": example.messages,
        "label": label,
        # What decides the label must not be on two splits: for deception that is the role and the stake.
        "topic": (behavior == "deception" and example.context) or example.topic,
        "arm": example.arm,
        "behavior_texts": behavior_texts(),
        "alternative_texts": [example.honest],
        "answer": example.answer,
        "wrong_answers": list(example.wrong_answers),
        "names": list(example.names),
    }


def contrast_records(behavior: str, seed: int, n_per_class: int = 800) -> list[ContrastRecord]:
    """Return up to `n_per_class` distinct prompts per class over combinations never seen in training.

    Refusal uses held-out verb/object pairs; deception held-out role/stake pairs, over all facts (so that a split
    by topic has enough topics). Greetings are left out, except that they are the label of ``style``.

    Args:
        behavior: ``"refusal"``, ``"deception"`` or ``"style"``.
        seed: which draw.
        n_per_class: the most prompts per class.
    """
    if behavior not in CONTRAST_ARMS:
        raise unknown("behavior", behavior, list(CONTRAST_ARMS))
    pools = make_pools("heldout")._replace(lie_facts=list(world.FACTS))
    rng = random.Random(f"contrast-{behavior}-{seed}")
    records: list[ContrastRecord] = []
    for label, arms in CONTRAST_ARMS[behavior].items():
        seen: set[str] = set()
        for _ in range(20 * n_per_class):
            if len(seen) == n_per_class:
                break
            greet = bool(label) if behavior == "style" else False
            example = make_example(rng.choice(arms), rng, pools, greet)
            key = str(example.messages)
            if behavior == "refusal" and example.deception:
                continue
            if key not in seen:
                seen.add(key)
                records.append(to_record(example, behavior, label))
    rng.shuffle(records)
    return records
