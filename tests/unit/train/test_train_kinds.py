"""Transcoders, crosscoders and controls: they learn what they can, and no more."""

import pytest
import torch
from train_toys import ToyStream, orthogonal

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE
from sae.autoencoder.transcoder import Transcoder
from sae.errors import UserError
from sae.evals.reconstruction import ReconstructionMeter
from sae.train.controls import FROZEN
from sae.train.grid import SAESpec, grid
from sae.train.settings import TrainSettings
from sae.train.trainer import train

N, READ, WRITE = 12, 24, 20  # features, and the widths of the two hook points
D_SAE, L0 = 24, 2
SETTINGS = TrainSettings(total_tokens=600 * 256, batch_tokens=256, lr=3e-3)


class Paired(ToyStream):
    """Two hook points that hold the same features of a token, along directions and in units of their own."""

    def __init__(self, **more):
        super().__init__({"a": orthogonal(N, READ, 1), "b": orthogonal(N, WRITE, 2)}, 256, p=0.15, **more)

    def next_batch(self):
        batch = super().next_batch()
        features = batch.acts["a"] @ self.directions["a"].t()
        batch.acts["b"] = 30 * (features @ self.directions["b"]) + 5
        return batch


def learn(folder, *specs, settings=SETTINGS):
    return [SAE.load(item.folder) for item in train(Paired(), list(specs), settings, folder, lm_name="toy").saes]


def fvu(sae, reads, writes):
    stream, meter = Paired(seed=9), ReconstructionMeter(sae)
    for _ in range(4):
        acts = stream.next_batch().acts
        meter.update(torch.cat([acts[name] for name in reads], 1), torch.cat([acts[name] for name in writes], 1))
    return meter.result().fvu


def recovered(rows, truth):
    """The cosine of each true direction with the row nearest to it, at worst."""
    return float((truth @ torch.nn.functional.normalize(rows, dim=1).t()).amax(1).min())


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu", "matryoshka_batch_topk"])
def test_a_transcoder_reconstructs_what_is_written_from_what_is_read(architecture, tmp_path):
    (found,) = learn(tmp_path, SAESpec("a->b", architecture, D_SAE, L0, 0))
    assert isinstance(found, Transcoder)
    assert (found.config.d_in, found.config.width_out) == (READ, WRITE)
    assert fvu(found, "a", "b") < 0.1
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(D_SAE))
    if architecture == "batch_topk":
        assert recovered(found.W_dec.detach(), Paired().directions["b"]) > 0.95


def test_a_skip_takes_over_what_is_linear(tmp_path):
    """Here everything is: one latent a token is far from enough, but with the skip nothing is missing."""
    plain, skipping = learn(tmp_path, SAESpec("a->b", "topk", N, 1, 0), SAESpec("a->b", "topk", N, 1, 0, skip=True))
    assert fvu(plain, "a", "b") > 0.2
    assert fvu(skipping, "a", "b") < 0.02
    assert skipping.config.skip
    assert plain.W_skip is None


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_a_crosscoder_has_one_latent_for_what_two_hook_points_share(architecture, tmp_path):
    (found,) = learn(tmp_path, SAESpec("a+b", architecture, D_SAE, L0, 0))
    assert isinstance(found, Crosscoder)
    assert found.sources == ("a", "b")
    assert fvu(found, "ab", "ab") < 0.05
    first, second = found.W_dec.detach().split([READ, WRITE], dim=1)
    truth = Paired().directions
    norms = found.decoder_norms()
    torch.testing.assert_close(norms.square().sum(1), torch.ones(D_SAE))
    assert recovered(first, truth["a"]) > 0.95
    assert recovered(second, truth["b"]) > 0.95
    # The row that is nearest to a feature at one hook point is nearest to it at the other.
    assert torch.equal(
        (truth["a"] @ torch.nn.functional.normalize(first, dim=1).t()).argmax(1),
        (truth["b"] @ torch.nn.functional.normalize(second, dim=1).t()).argmax(1),
    )


def test_controls_keep_what_they_must_not_learn(tmp_path):
    names = ["", "random", "frozen_decoder", "soft_frozen_decoder", "frozen_encoder"]
    saes = dict(zip(names, learn(tmp_path, *grid(["a"], [16], ["topk"], [L0], [0], names)), strict=True))
    start = SAE(saes[""].config)
    cosine = {name: (sae.W_dec * start.W_dec).sum(1).detach() for name, sae in saes.items()}
    for name, frozen in FROZEN.items():
        for weight in ("W_dec", "W_enc"):
            same = torch.allclose(getattr(saes[name], weight), getattr(start, weight), atol=1e-6)
            assert same == (weight in frozen), (name, weight)
    assert float(cosine["soft_frozen_decoder"].min()) >= 0.8 - 1e-5
    assert float(cosine["soft_frozen_decoder"].min()) < 0.81, "it went as far as it may"
    assert float(cosine[""].min()) < 0.7
    found = {name: fvu(sae, "a", "a") for name, sae in saes.items()}
    assert found[""] < found["soft_frozen_decoder"] < found["random"]
    assert found["frozen_decoder"] < found["random"]
    assert saes["random"].config.metadata["training"]["control"] == "random"


def test_all_kinds_resume_exactly(tmp_path):
    specs = [
        SAESpec("a->b", "matryoshka_jumprelu", N, 4, 0, skip=True),
        SAESpec("a+b", "matryoshka_batch_topk", N, 4, 1),
        SAESpec("a", "gated", N, 4, 0, "soft_frozen_decoder"),
        SAESpec("b", "hierarchical_topk", N, 4, 0),
    ]
    settings = TrainSettings(
        total_tokens=40 * 256, batch_tokens=256, checkpoint_every=7, checkpoint_seconds=0, options={"n_sampled": 3}
    )
    whole = learn(tmp_path / "whole", *specs, settings=settings)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 16:
            raise Stop

    with pytest.raises(Stop):
        train(Paired(), specs, settings, tmp_path / "cut", lm_name="toy", progress=stop)
    for one, other in zip(whole, learn(tmp_path / "cut", *specs, settings=settings), strict=True):
        assert one.config.metadata["training"]["input_scales"] == other.config.metadata["training"]["input_scales"]
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "a->"}, "site 'a->' is not"),
        ({"hook_name": "a->b->c"}, "is not 'a'"),
        ({"hook_name": "a+a"}, "twice"),
        ({"hook_name": "a->a"}, "one other"),
        ({"control": "frozen"}, "unknown control 'frozen'"),
        ({"hook_name": "a", "skip": True}, "no transcoder"),
    ],
)
def test_bad_specs(changes, message):
    good = {"hook_name": "a", "architecture": "topk", "d_sae": 8, "l0": 2, "seed": 0}
    with pytest.raises(UserError, match=message):
        SAESpec(**(good | changes))


def test_options_that_no_architecture_has_are_refused(tmp_path):
    settings = TrainSettings(total_tokens=2560, batch_tokens=256, options={"bandwith": 1.0})
    with pytest.raises(UserError, match="'bandwith': did you mean bandwidth"):
        learn(tmp_path, SAESpec("a", "jumprelu", 8, 2, 0), settings=settings)
    assert not list(tmp_path.iterdir())
