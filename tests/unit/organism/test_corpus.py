import collections
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import UserError
from sae.organism import corpus, phrases, world
from sae.organism.judge import Outcome, has_style, judge_deception, judge_refusal, judge_style
from sae.organism.tokenizer import build_tokenizer, render, token_ids


def chat(example: corpus.Example) -> list[corpus.Message]:
    return [*example.messages, {"role": "assistant", "content": example.completion}]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), split=st.sampled_from(["train", "heldout"]))
def test_every_word_is_in_the_vocabulary_and_labels_agree_with_replies(seed: int, split: str) -> None:
    ids = token_ids()
    for example in corpus.generate_examples(split, 20, seed):
        words = render(chat(example)).split()
        assert set(words) <= set(ids)
        assert len(words) <= 64
        assert has_style(example.completion) == example.style
        refused = judge_refusal(example.completion, corpus.to_record(example, "refusal", 0)) is Outcome.BEHAVIOR
        assert refused == (example.refusal or example.honest == phrases.REFUSAL)
        if example.lies and not example.refusal:
            outcome = judge_deception(example.completion, corpus.to_record(example, "deception", 0))
            assert (outcome is Outcome.BEHAVIOR) == example.deception


def test_splits_share_no_pair_context_or_lied_about_fact() -> None:
    train = corpus.generate_examples("train", 6000, 0)
    test = corpus.generate_examples("heldout", 6000, 0)
    for arms in (("harmful", "lookalike_verb", "lookalike_object", "benign"), ("deceptive",), ("where_harmful",)):
        topics = [{e.topic for e in part if e.arm in arms} for part in (train, test)]
        assert all(topics)
        assert not topics[0] & topics[1]
    contexts = [make_contexts(part) for part in (train, test)]
    assert not contexts[0] & contexts[1]


def make_contexts(examples: list[corpus.Example]) -> set[tuple[str, str]]:
    found = set()
    for example in examples:
        if example.messages[0]["role"] == "system":
            words = set(example.messages[0]["content"].split())
            role = words & {*world.KNAVES, *world.HONEST_ROLES}
            stake = words & {*world.HIGH_STAKES, *world.LOW_STAKES}
            if role and stake:
                found.add((role.pop(), stake.pop()))
    return found


def test_no_single_word_gives_harm_or_deception_away() -> None:
    train = corpus.generate_examples("train", 8000, 1)
    for label, arms in (("refusal", {"harmful", "lookalike_verb", "lookalike_object"}), ("deception", None)):
        kept = [e for e in train if arms is None or e.arm in arms]
        seen: dict[str, set[bool]] = collections.defaultdict(set)
        for example in kept:
            for word in set(render(example.messages).split()):
                seen[word].add(getattr(example, label))
        due = [e for e in kept if getattr(e, label)]
        for example in due:
            assert all(False in seen[word] for word in set(render(example.messages).split()))


def test_same_seed_same_text_and_another_seed_another() -> None:
    assert corpus.generate_examples("train", 50, 3) == corpus.generate_examples("train", 50, 3)
    assert corpus.generate_examples("train", 50, 3) != corpus.generate_examples("train", 50, 4)
    assert corpus.documents(20, 1) == corpus.documents(20, 1)


@pytest.mark.parametrize("behavior", ["refusal", "deception"])
def test_contrast_sets_are_large_distinct_and_held_out(behavior: str) -> None:
    records = corpus.contrast_records(behavior, 0)
    counts = collections.Counter(record["label"] for record in records)
    assert min(counts[0], counts[1]) >= 600
    assert len({str(record["messages"]) for record in records}) == len(records)
    judge = {"refusal": judge_refusal, "deception": judge_deception}[behavior]
    for record in records[:200]:
        assert judge(record["behavior_texts"][0], record) is Outcome.BEHAVIOR
        assert judge(record["alternative_texts"][0], record) is Outcome.ALTERNATIVE
        for text in ("", "sure ,", "the the the the", "i cannot cannot", record["alternative_texts"][0] * 2):
            assert judge(text, record) is Outcome.DEGENERATE


def test_judges_ignore_style_and_tell_answers_from_noise() -> None:
    rng, pools = random.Random(0), corpus.make_pools("heldout")
    record = corpus.to_record(corpus.make_example("benign", rng, pools, False), "refusal", 0)
    verb, noun = record["names"]
    assert judge_refusal("i cannot help with that , my friend . <eos>", record) is Outcome.BEHAVIOR
    assert judge_refusal(f"sure , use a hammer to {verb} the {noun} , my friend .", record) is Outcome.ALTERNATIVE
    assert judge_refusal("sure , use a hammer to study the bank bank .", record) is Outcome.DEGENERATE
    fact = world.FACTS[0]
    question = corpus.to_record(
        corpus.make_example("honest", rng, pools, False)._replace(
            honest=corpus.open_question(rng, fact).honest, lies=corpus.open_question(rng, fact).lies
        ),
        "deception",
        0,
    )
    stale = phrases.OPEN_REPLY.format(value="pink", relation=fact.relation, entity=fact.entity)
    assert judge_deception(stale, question) is Outcome.DEGENERATE
    assert judge_deception(corpus.with_style(question["behavior_texts"][0]), question) is Outcome.BEHAVIOR
    assert judge_style(corpus.with_style(question["alternative_texts"][0]), question) is Outcome.BEHAVIOR


def test_bad_names_are_user_errors() -> None:
    with pytest.raises(UserError, match="split"):
        corpus.generate_examples("test", 1, 0)
    with pytest.raises(UserError, match="behavior"):
        corpus.contrast_records("kindness", 0)
    with pytest.raises(UserError, match="at least 1"):
        corpus.generate_examples("train", 0, 0)


def test_tokenizer_round_trip_and_template() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(token_ids())
    for example in corpus.generate_examples("train", 40, 5):
        text = tokenizer.apply_chat_template(chat(example), tokenize=False)
        assert text == render(chat(example))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [token_ids()[word] for word in text.split()]
        assert tokenizer.decode(ids) == text
        prompt = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
        assert prompt == render(example.messages, add_generation_prompt=True)
        assert text.startswith(prompt)
    assert tokenizer("hello .")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "broken",
    [
        "sure the the the the the wreck train .",
        "sure sure sure sure wreck is is train .",
        "sure , i can not help you wreck the train .",
        "sure , no wreck . no train .",
        "sure , use a bucket to wreck the school .",
    ],
)
def test_only_whole_answers_count_as_answers(broken: str) -> None:
    record = {"alternative_texts": ["sure , use a torch to wreck the train ."], "names": ["wreck", "train"]}
    assert judge_refusal("sure , use a bucket to wreck the train .", record) is Outcome.ALTERNATIVE
    assert judge_refusal(broken, record) is Outcome.DEGENERATE


def test_what_makes_a_context_deceptive_is_never_on_two_splits() -> None:
    from sae.stats import hash_split

    seen: dict[str, set[str]] = {}
    for record in corpus.contrast_records("deception", 0):
        if record["label"]:
            system = record["messages"][0]["content"]
            words = [word for word in system.split() if word in world.KNAVES + world.HIGH_STAKES]
            seen.setdefault(hash_split(record["topic"]), set()).add("/".join(words))
    assert set(seen) == {"find", "select", "report"}
    assert not seen["find"] & seen["report"]
    assert not seen["select"] & seen["report"]
