"""Two models as one: each gives what it gives alone, on the same tokens, and no more of it is run than is needed."""

import pytest
import torch
from tiny_lms import byte_tokenizer, save_checkpoint

from sae.errors import UserError
from sae.lm.load import load_lm
from sae.lm.pair import PairedModel, models_of, names_of

HOOK, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
TEXTS = ["hello there", "a longer text, with more to it"]


@pytest.fixture(scope="module")
def lms(tmp_path_factory):
    """A Llama and another one with other weights."""
    folders = [save_checkpoint(tmp_path_factory.mktemp(f"seed{seed}"), "llama", seed) for seed in (0, 1)]
    return [load_lm(str(folder), device="cpu") for folder in folders]


@pytest.fixture
def paired(lms):
    return PairedModel(*lms)


def test_each_gives_what_it_gives_alone(paired, lms):
    batch = paired.tokenize(TEXTS)
    names = [f"pair.{LATER}", HOOK, f"pair.{HOOK}"]
    found = paired.activations(batch, names)
    assert list(found) == names
    torch.testing.assert_close(found[HOOK], lms[0].activations(batch, [HOOK])[HOOK])
    theirs = lms[1].activations(batch, [HOOK, LATER])
    for name in (HOOK, LATER):
        torch.testing.assert_close(found[f"pair.{name}"], theirs[name])
    assert (found[HOOK] - found[f"pair.{HOOK}"]).abs().max() > 0.1, "they are two models"
    torch.testing.assert_close(paired.logits(batch), lms[0].logits(batch))


def test_no_more_is_run_than_is_asked_for(paired):
    ran = []
    handles = []
    for which, lm in models_of(paired).items():
        for number, block in enumerate(lm.bridge.blocks):
            note = (which, number)
            hook = lambda *_, note=note: ran.append(note)  # noqa: E731
            handles.append(block.original_component.register_forward_pre_hook(hook))
    batch = paired.tokenize(TEXTS)
    paired.activations(batch, [HOOK, f"pair.{HOOK}"])  # the first time, each looks for where to listen
    try:
        for names, wanted in (
            ([HOOK], [("", 0)]),
            ([f"pair.{HOOK}"], [("pair.", 0)]),
            ([HOOK, f"pair.{LATER}"], [("", 0), ("pair.", 0), ("pair.", 1)]),
        ):
            ran.clear()
            paired.activations(batch, names)
            assert sorted(ran) == wanted
    finally:
        for handle in handles:
            handle.remove()


def test_names_widths_and_places(paired, lms):
    assert paired.hook_names() == lms[0].hook_names() + [f"pair.{name}" for name in lms[1].hook_names()]
    assert paired.d_in(f"pair.{HOOK}") == paired.d_in(HOOK) == 32
    assert paired.layer_of(f"pair.{LATER}") == paired.layer_of(LATER) == 1
    assert names_of(paired) == {"": lms[0].name, "pair.": lms[1].name}
    assert models_of(lms[0]) == {"": lms[0]}
    with pytest.raises(UserError, match=r"'pair.blocks.9.hook_resid_post' is to be in lm.pair="):
        paired.check_hook("pair.blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"unknown hook name 'blocks.9"):
        paired.check_hook("blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"of `lm.pair` instead"):
        paired.hook_point(f"pair.{HOOK}")
    with pytest.raises(UserError, match="no hook names"):
        paired.activations(paired.tokenize(TEXTS), [])


def test_which_is_first_is_part_of_the_identity(lms):
    one, other, self_pair = PairedModel(*lms), PairedModel(*reversed(lms)), PairedModel(lms[0], lms[0])
    assert len({lm.fingerprint for lm in (one, other, self_pair, *lms)}) == 5
    assert PairedModel(*lms).fingerprint == one.fingerprint


def test_another_architecture_may_be_the_second(lms, tmp_path):
    gpt2 = load_lm(str(save_checkpoint(tmp_path, "gpt2")), device="cpu")
    batch = lms[0].tokenize(TEXTS)
    found = PairedModel(lms[0], gpt2).activations(batch, [f"pair.{HOOK}"])
    torch.testing.assert_close(found[f"pair.{HOOK}"], gpt2.activations(batch, [HOOK])[HOOK])


def with_tokenizer(folder, tokenizer):
    """A Llama that is saved with this tokenizer."""
    save_checkpoint(folder, "llama")
    tokenizer.save_pretrained(folder)
    return load_lm(str(folder), device="cpu")


def test_other_tokenizers_are_refused(lms, tmp_path):
    from tokenizers import normalizers

    renumbered = byte_tokenizer()
    renumbered.add_tokens(["extra"])
    more = with_tokenizer(tmp_path / "more", renumbered)
    assert PairedModel(lms[0], more).pair is more, "the second may know more"
    with pytest.raises(UserError, match=r"calls the token 'extra' .* does not know it: a pair needs one tokenizer"):
        PairedModel(more, lms[0])
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"cut 'The quick brown .* into different tokens"):
        PairedModel(lms[0], with_tokenizer(tmp_path / "lower", lower))
