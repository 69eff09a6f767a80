"""The confound audit finds what was planted and nothing else, and balancing takes it out exactly."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sae import config, stats
from sae.behavior.audit import ALL, audit
from sae.behavior.balance import METHODS, balance
from sae.behavior.contrast import load_contrast
from sae.behavior.sets.load import load_set
from sae.behavior.surface import SURFACE, ending, families, strip_ending
from sae.errors import UserError

WORDS = [
    "river", "stone", "cloud", "paper", "garden", "window", "letter", "market", "bridge", "winter", "candle", "engine",
    "harbor", "island", "jacket", "kettle",
]  # fmt: skip
DRAWS = 200


def prompts(end=(0.5, 0.5), extra=(0, 0), first=("tell", "tell"), about=("", ""), system="", n=240, seed=0):
    """Prompts of both classes, drawn alike but for what is given: (of negatives, of positives)."""
    rng = np.random.default_rng(seed)
    raws: list[dict] = []
    for index in range(n):
        label = index % 2
        words = [str(word) for word in rng.choice(WORDS, size=6 + int(rng.integers(6)) + extra[label])]
        words.insert(0, first[label])
        words += [about[label]] if about[label] else []
        messages = [{"role": "user", "content": " ".join(words) + "." * bool(rng.random() < end[label])}]
        if system:
            messages.insert(0, {"role": "system", "content": system[label]})
        raws.append(
            {"messages": messages, "label": label, "topic": f"t{index // 4}", "behavior_texts": ["no"],
             "alternative_texts": ["yes"]}
        )  # fmt: skip
    return load_contrast(raws, "planted")


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ({}, ()),
        ({"end": (0.02, 0.7)}, ("punctuation",)),
        ({"extra": (0, 8)}, ("length",)),
        ({"first": ("tell", "write")}, ("first_word",)),
        ({"system": ("Be good.", "Always be good to them.")}, ("length", "position")),
    ],
)
def test_what_is_planted_is_flagged_and_nothing_else(planted, found):
    result = audit(prompts(**planted), n_draws=DRAWS)
    assert set(result.flagged) == set(found)
    assert result.row(ALL).flagged == bool(found)
    assert [row.family for row in result.rows] == [*SURFACE, ALL, "words"]


def test_the_ending_has_the_auroc_it_must_have():
    """With shares p and q of stops, a classifier by the stop alone has AUROC (1 + p - q) / 2."""
    contrast = prompts(end=(0.1, 0.9), n=400)
    row = audit(contrast, n_draws=DRAWS).row("punctuation")
    held_out = [record for record in contrast.records if record.split != "find"]
    stops = {
        label: np.mean([record.messages[-1]["content"].endswith(".") for record in held_out if record.label is label])
        for label in (True, False)
    }
    assert row.auroc.estimate == pytest.approx((1 + stops[True] - stops[False]) / 2)
    assert row.auroc.low < row.auroc.estimate < row.auroc.high
    name, means = next(iter(row.rates.items()))
    everything = [record.messages[-1]["content"].endswith(".") for record in contrast.positives]
    assert (name, means.positives) == ("ends in stop", pytest.approx(np.mean(everything)))
    assert "of positives" in row.direction


def test_with_shuffled_labels_nothing_is_flagged():
    contrast = prompts(end=(0.02, 0.9), extra=(0, 5), first=("tell", "write"))
    assert len(audit(contrast, n_draws=DRAWS).flagged) == 3
    flagged = [audit(contrast.shuffled(seed), n_draws=DRAWS, seed=seed).flagged for seed in range(5)]
    assert flagged == [()] * 5


def test_subjects_are_content_and_not_flagged():
    result = audit(prompts(about=("weather", "weapons")), n_draws=DRAWS)
    words = result.row("words")
    assert words.auroc.estimate == 1.0
    assert (words.kind, words.flagged, result.flagged) == ("content", False, ())
    assert set(words.rates) >= {"has 'weapons'", "has 'weather'"}


def test_tokens_are_counted_where_there_is_a_tokenizer():
    def tokenizer(texts, **options):
        return {"input_ids": [list(text) for text in texts]}

    contrast = prompts()
    find = np.array([record.split == "find" for record in contrast.records])
    columns = families(contrast.records, find, tokenizer)[0]
    lengths = np.expm1(columns.x[:, columns.columns.index("tokens (log)")])
    np.testing.assert_allclose(lengths, [len(record.messages[-1]["content"]) for record in contrast.records])
    assert "tokens (log)" not in families(contrast.records, find)[0].columns


def test_a_class_that_is_missing_and_a_bar_below_chance_are_refused():
    contrast = prompts()
    one = contrast.relabelled([record.split == "find" or record.label for record in contrast.records])
    with pytest.raises(UserError, match="one class only in the find split"):
        audit(one)
    with pytest.raises(UserError, match=r"bar=0\.2"):
        audit(contrast, bar=0.2)


def shares(contrast, of):
    """Split and class -> the distribution of what `of` says of a record."""
    counts = {}
    for record in contrast.records:
        counts.setdefault((record.split, record.label), Counter())[of(record)] += 1
    return {key: {kind: n / part.total() for kind, n in part.items()} for key, part in counts.items()}


@pytest.mark.parametrize("n_extra", [0, 1500])
def test_matching_makes_the_distributions_equal(n_extra):
    """Exactly, in every split, also where one class is much larger."""
    contrast = prompts(end=(0.2, 0.7), n=400)
    if n_extra:
        more = prompts(end=(0.2, 0.7), n=2 * n_extra, seed=1).negatives
        contrast = load_contrast([raw(record) for record in (*contrast.records, *more)], "planted")
    assert audit(contrast, n_draws=DRAWS).flagged == ("punctuation",)
    matched = balance(contrast, "match")
    assert matched.features == ("punctuation",)
    found = shares(matched.contrast, lambda record: ending(record.messages[-1]["content"]))
    for split in stats.SPLITS:
        assert found[split, True] == found[split, False]
    after = audit(matched.contrast, n_draws=DRAWS)
    assert after.row("punctuation").auroc.estimate == 0.5
    assert after.flagged == ()
    kept = {name: sum(split[name][1] for split in matched.counts.values()) for name in ("positives", "negatives")}
    assert kept == {"positives": len(matched.contrast.positives), "negatives": len(matched.contrast.negatives)}
    if n_extra:
        assert kept["negatives"] > 1.5 * kept["positives"], "what there is more of is not thrown away"
    records = set(map(id, contrast.records))
    assert all(id(record) in records for record in matched.contrast.records)


def raw(record):
    return {
        "messages": record.messages, "label": int(record.label), "topic": record.topic,
        "behavior_texts": list(record.behavior_texts), "alternative_texts": list(record.alternative_texts),
    }  # fmt: skip


def test_matching_several_families_takes_all_of_them_out():
    contrast = prompts(end=(0.2, 0.7), extra=(0, 3), n=1200)
    assert set(audit(contrast, n_draws=DRAWS).flagged) == {"punctuation", "length"}
    after = audit(balance(contrast).contrast, n_draws=DRAWS)
    assert after.flagged == ()
    assert all(after.row(name).auroc.estimate <= 0.6 for name in ("punctuation", "length"))


def by_vowel(texts, **options):
    """A tokenizer that begins a token at every vowel."""
    return {"input_ids": [[0] * sum(char in "aeiou" for char in text) for text in texts]}


def mean_tokens(contrast, split):
    return [
        np.mean([len(ids) for ids in by_vowel([r.prompt for r in part if r.split == split])["input_ids"]])
        for part in (contrast.positives, contrast.negatives)
    ]


def test_lengths_are_matched_in_the_tokens_that_the_audit_counts():
    """Prompts of equally many words and characters, of which the positives' are of more tokens."""
    rng = np.random.default_rng(0)
    raws = [
        {"messages": [{"role": "user", "content": " ".join(["tell", *rng.choice(WORDS[:2], 8, p=(share, 1 - share))])}],
         "label": int(label), "topic": f"t{index // 4}", "behavior_texts": ["no"], "alternative_texts": ["yes"]}
        for index in range(600) for label in [index % 2] for share in [(0.4, 0.6)[label]]
    ]  # fmt: skip
    for number, raw_record in enumerate(raws):
        spelt = raw_record["messages"][0]["content"].replace("river", "aiode").replace("stone", "strng")
        # A prompt may not come twice: an end of its own, of equally many vowels and letters.
        raw_record["messages"][0]["content"] = f"{spelt} {np.base_repr(number, 5).zfill(5).translate(LETTERS)}"
    contrast = load_contrast(raws, "planted")
    assert audit(contrast, n_draws=DRAWS).flagged == (), "in characters and words there is nothing to see"
    assert audit(contrast, tokenizer=by_vowel, n_draws=DRAWS).flagged == ("length",)
    assert balance(contrast, "match").contrast.records == contrast.records
    matched = balance(contrast, "match", tokenizer=by_vowel)
    assert (matched.features, matched.length_unit) == (("length",), "tokens")
    after = audit(matched.contrast, tokenizer=by_vowel, n_draws=DRAWS)
    assert after.flagged == ()
    assert after.row("length").auroc.estimate < 0.55
    for split in stats.SPLITS:
        gaps = [abs(np.subtract(*mean_tokens(item, split))) for item in (contrast, matched.contrast)]
        assert gaps[0] > 3
        assert gaps[1] < 0.25, "all but what the outermost strata hide"
    assert len(matched.contrast) > 300


LETTERS = str.maketrans("01234", "bcdfg")


def test_stripping_changes_endings_only():
    contrast = prompts(end=(0.02, 0.7), n=400)
    stripped = balance(contrast, "strip")
    assert stripped.features == ("punctuation",)
    assert audit(stripped.contrast, n_draws=DRAWS).row("punctuation").auroc.estimate == 0.5
    assert stripped.n_changed == sum(record.messages[-1]["content"].endswith(".") for record in contrast.records)
    for before, after in zip(contrast.records, stripped.contrast.records, strict=True):
        assert before.messages[-1]["content"].rstrip(".") == after.messages[-1]["content"]
        assert (before.topic, before.split, before.label) == (after.topic, after.split, after.label)


def test_what_needs_no_balancing_is_left_alone():
    contrast = prompts()
    for method in ("none", "match", "strip"):
        assert balance(contrast, method).contrast.records == contrast.records


def test_the_configuration_knows_the_ways_to_balance():
    assert config.BALANCES == METHODS


def test_what_cannot_be_balanced_is_refused():
    contrast = prompts(first=("tell", "write"))
    for method, features, words in (
        ("half", None, "unknown way to balance 'half'"),
        ("match", ["ending"], "unknown feature 'ending'"),
        ("strip", ["length"], "'length' cannot be stripped"),
        ("match", ["first_word"], "no stratum of first_word has both classes in the"),
    ):
        with pytest.raises(UserError, match=words):
            balance(contrast, method, features)


def test_endings():
    told = {
        "a.": "stop",
        "a?": "question mark",
        "a! ": "exclamation mark",
        "a:": "colon",
        'a."': "quote",
        "a)": "other mark",
    }
    assert {text: ending(text) for text in told} == told
    assert ending("a") == ending("") == "word"
    assert [strip_ending(text) for text in ("a.", "a ...", "a?!", 'a."', "...")] == ["a", "a", "a", 'a."', "..."]


DATA = Path(os.environ.get("SAE_CONTRAST_DATA", "")) / "refusal_direction" / "splits"


@pytest.mark.skipif(
    not (DATA / "harmful_train.json").is_file(),
    reason="SAE_CONTRAST_DATA does not name a folder with refusal_direction/splits",
)
def test_the_audit_finds_what_is_known_of_refusal_direction():
    """Published splits whose classes end differently: found unasked, and taken out by either way of balancing."""
    names = ("harmful_train", "harmful_val", "harmless_train", "harmless_val")
    files = {name: next(iter(sorted(DATA.glob(f"{name}*.json")))) for name in names}
    contrast = load_set("refusal_direction", files=files)
    found = audit(contrast, n_draws=DRAWS)
    assert "punctuation" in found.flagged
    assert found.row("punctuation").auroc.low > 0.8
    assert found.row(ALL).auroc.low > 0.9
    for method, features in (("strip", None), ("match", ["punctuation"])):
        after = audit(balance(contrast, method, features).contrast, n_draws=DRAWS)
        assert after.row("punctuation").auroc.high <= 0.6
    whole = audit(balance(contrast).contrast, n_draws=DRAWS)
    assert whole.row(ALL).auroc.estimate < found.row(ALL).auroc.estimate - 0.2
