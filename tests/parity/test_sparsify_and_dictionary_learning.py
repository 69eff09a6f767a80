"""sparsify and dictionary_learning agree with us on SAEs that they wrote and we read, and on those that we wrote.

Every class of theirs is written by its own code, with random biases, thresholds and norms; one process of theirs does
it all, and reads what we wrote besides.
"""

import json

import pytest
import torch
from peers import ask_peer
from safetensors.torch import load_file, save_file

import sae
from sae.autoencoder.sae import SAEConfig, make
from sae.formats import dictionary_learning, sparsify

D_IN, D_SAE, K, TOKENS = 16, 48, 6, 40
HOOK, SITE = "blocks.2.hook_resid_post", "blocks.2.mlp.hook_in->blocks.2.mlp.hook_out"

WORKER = """
import json, os, sys, types
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

for name in ("nnsight", "zstandard"):  # for reading language models and texts, which is nothing that happens here
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["nnsight"].LanguageModel = object
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

folder, D_IN, D_SAE, K = Path(sys.argv[1]), *map(int, sys.argv[2:])
torch.manual_seed(0)
x = load_file(folder / "x.safetensors")["x"]
found = {}


def randomise(module):
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor += (0.1 if tensor.ndim == 2 else 0.3) * torch.randn(tensor.shape)
            if name == "threshold":
                tensor.copy_(0.5 * torch.randn(tensor.shape) + 0.4)


def sparse(name, coder):
    out, acts = coder(x), coder.encode(x)
    found[name + ".acts"] = torch.zeros(len(x), D_SAE).scatter_add(1, acts.top_indices, acts.top_acts)
    found[name + ".decoded"] = coder.decode(acts.top_acts, acts.top_indices)
    # With multi_topk, what forward gives back is from 4k latents, for that loss; encode is from k as ever.
    found[name + ".recons"] = found[name + ".decoded"].clone() if coder.cfg.multi_topk else out.sae_out


def dense(name, dictionary):
    acts = dictionary.encode(x)
    found[name + ".acts"], found[name + ".decoded"] = acts, dictionary.decode(acts)
    found[name + ".recons"] = dictionary(x)


CODERS = {
    "layers.3": {},
    "layers.3.mlp": {"transcode": True},
    "h.3": {"transcode": True, "skip_connection": True},
    "layers.4/seed1": {"multi_topk": True, "normalize_decoder": False},
    "layers.5": {"activation": "groupmax"},
}
with torch.no_grad():
    run = folder / "sparsify"
    for name, options in CODERS.items():
        coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **options))
        randomise(coder)
        coder.save_to_disk(run / name)
        sparse("sparsify/" + name, SparseCoder.load_from_disk(run / name))
    (run / "config.json").write_text(json.dumps({"sae": {"k": K}, "model": "toy/lm"}))

common = dict(steps=3, activation_dim=D_IN, dict_size=D_SAE, layer=2, lm_name="toy/lm", device="cpu", warmup_steps=1)
batch = dict(k=K, threshold_start_step=0, submodule_name="resid_post_layer_2")
TRAINERS = {
    "standard": dict(trainer=StandardTrainer, sparsity_warmup_steps=1),
    "april": dict(trainer=StandardTrainerAprilUpdate, sparsity_warmup_steps=1),
    "gated": dict(trainer=GatedSAETrainer, sparsity_warmup_steps=1),
    "jumprelu": dict(trainer=JumpReluTrainer, sparsity_warmup_steps=1, target_l0=5.0),
    "topk": dict(trainer=TopKTrainer, **batch),
    "batch_topk": dict(trainer=BatchTopKTrainer, **batch),
    "matryoshka": dict(trainer=MatryoshkaBatchTopKTrainer, group_fractions=[0.1, 0.3, 0.6], **batch),
}
trainSAE((x.clone() for _ in range(200)), [common | own for own in TRAINERS.values()], steps=3,
         save_dir=str(folder / "trained"), device="cpu", normalize_activations=True, save_steps=[2])
with torch.no_grad():
    for number, name in enumerate(TRAINERS):
        place = folder / "trained" / f"trainer_{number}"
        dense("trained/" + name, load_dictionary(str(place), "cpu")[0])
        place = place.rename(folder / "trained" / name)
        if name == "topk":
            dense("trained/checkpoint", AutoEncoderTopK.from_pretrained(str(place / "checkpoints" / "ae_2.pt")))
        # Three steps leave most of it as it began: the same class with everything moved.
        dictionary, config = load_dictionary(str(place), "cpu")
        randomise(dictionary)
        other = folder / "random" / name
        other.mkdir(parents=True)
        torch.save(dictionary.state_dict(), other / "ae.pt")
        (other / "config.json").write_text(json.dumps(config))
        dense("random/" + name, load_dictionary(str(other), "cpu")[0])
    dictionary = AutoEncoderNew(D_IN, D_SAE)
    randomise(dictionary)
    other = folder / "random" / "new"
    other.mkdir()
    torch.save(dictionary.state_dict(), other / "ae.pt")
    config["trainer"] = {"dict_class": "AutoEncoderNew", "lm_name": "toy/lm"}
    (other / "config.json").write_text(json.dumps(config))
    dense("random/new", load_dictionary(str(other), "cpu")[0])

    for place in sorted((folder / "ours" / "sparsify").iterdir()):
        sparse("ours/sparsify/" + place.name, SparseCoder.load_from_disk(place))
    for place in sorted((folder / "ours" / "dictionary_learning").iterdir()):
        dense("ours/dictionary_learning/" + place.name, load_dictionary(str(place), "cpu")[0])
save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
print(json.dumps(sorted(found)))
"""
SPARSIFY = {  # folder of a run: what it is there
    "layers.3": ("topk", "blocks.3.hook_resid_post"),
    "layers.3.mlp": ("topk", "blocks.3.mlp.hook_in->blocks.3.mlp.hook_out"),
    "h.3": ("topk", "blocks.3.hook_resid_pre->blocks.3.hook_resid_post"),
    "layers.4/seed1": ("topk", "blocks.4.hook_resid_post"),
    "layers.5": ("groupmax", "blocks.5.hook_resid_post"),
}
CLASSES = {
    "standard": ("relu", 0),
    "april": ("relu", 0),
    "gated": ("gated", 0),
    "jumprelu": ("jumprelu", 5.0),
    "topk": ("topk", K),
    "batch_topk": ("batch_topk", K),
    "matryoshka": ("matryoshka_batch_topk", K),
    "new": ("relu", 0),
}
OURS = {  # architecture, site and skip, where it is written, whether rows have norm 1
    "sparsify": [
        ("topk", HOOK, False),
        ("hierarchical_topk", HOOK, False),
        ("groupmax", HOOK, False),
        ("topk", SITE, False),
        ("topk", SITE, True),
    ],
    "dictionary_learning": [
        *((name, site, False) for name in ("relu", "gated", "jumprelu", "topk", "batch_topk") for site in (HOOK, SITE)),
        *((name, HOOK, False) for name in ("hierarchical_topk", "matryoshka_batch_topk", "matryoshka_jumprelu")),
    ],
}
WRITTEN = [(library, number) for library, cases in OURS.items() for number in range(len(cases))]


def ours(architecture, hook_name, skip, seed, unit_rows):
    """An SAE in which nothing is zero or one that could be left out."""
    made = make(SAEConfig(architecture, D_IN, D_SAE, K, seed, hook_name, "toy/lm", skip=skip))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("threshold"):
                tensor += noise.abs()
            elif name != "W_dec":
                tensor += (0.1 if tensor.ndim == 2 else 0.3) * noise
            elif not unit_rows:
                tensor *= 1 + noise[:, :1].abs()
        if architecture.endswith("batch_topk"):
            made.sparsity.threshold.fill_(0.7)
    return made.eval()


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Folder, inputs, our SAEs as we wrote them, and what they find for every SAE."""
    folder = tmp_path_factory.mktemp("peers")
    x = 2 * torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(9)) + 0.5
    save_file({"x": x}, folder / "x.safetensors")
    made = {}
    for library, number in WRITTEN:
        # Even ones have decoder rows of other norms than 1.
        one = made[library, number] = ours(*OURS[library][number], seed=number, unit_rows=bool(number % 2))
        {"sparsify": sparsify, "dictionary_learning": dictionary_learning}[library].FORMAT.write(
            one, folder / "ours" / library / str(number)
        )
    ask_peer(WORKER, folder, folder, D_IN, D_SAE, K)
    return folder, x, made, load_file(folder / "found.safetensors")


def assert_agrees(one, x, found, name):
    """Latents, what is decoded from them, and the reconstruction, within 1e-5 of the largest."""
    with torch.no_grad():
        out, acts = one(x), found[f"{name}.acts"]
        results = {"acts": out.latent_acts, "decoded": one.decode(acts), "recons": out.recons}
    assert torch.equal(out.latent_acts != 0, acts != 0)
    assert 1 < (acts != 0).sum(1).float().mean() < 40
    for what, mine in results.items():
        theirs = found[f"{name}.{what}"]
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5, f"{what} of {name}: {error:.1e}"


@pytest.mark.parametrize("name", SPARSIFY)
def test_what_sparsify_wrote(peers, name):
    folder, x, _, found = peers
    one = sae.load(folder / "sparsify" / name)
    architecture, hook_name = SPARSIFY[name]
    config = one.config
    assert (config.architecture, config.hook_name, config.lm_name, config.l0) == (architecture, hook_name, "toy/lm", K)
    assert config.metadata["source"]["said"]["num_latents"] == D_SAE
    assert_agrees(one, x, found, f"sparsify/{name}")


@pytest.mark.parametrize(
    ("kind", "name"),  # no trainer of theirs makes an AutoEncoderNew any more
    [("random", "new"), *((kind, name) for kind in ("trained", "random") for name in CLASSES if name != "new")],
)
def test_what_dictionary_learning_wrote(peers, kind, name):
    folder, x, _, found = peers
    architecture, l0 = CLASSES[name]
    says = architecture.endswith("topk")  # where the hook point is
    one = sae.load(folder / kind / name, **({} if says else {"hook_name": HOOK}))
    config = one.config
    assert (config.architecture, config.hook_name, config.lm_name, config.l0) == (architecture, HOOK, "toy/lm", l0)
    assert_agrees(one, x, found, f"{kind}/{name}")
    if name == "matryoshka":
        assert one.sparsity.prefix_sizes(0) == [4, 18, 48]


def test_a_checkpoint_of_theirs_is_opened_by_its_file(peers):
    folder, x, _, found = peers
    one = sae.load(folder / "trained" / "topk" / "checkpoints" / "ae_2.pt")
    assert one.config.hook_name == HOOK
    assert_agrees(one, x, found, "trained/checkpoint")
    assert not torch.equal(found["trained/checkpoint.recons"], found["trained/topk.recons"])


@pytest.mark.parametrize(("library", "number"), WRITTEN)
def test_what_we_wrote(peers, library, number):
    folder, x, made, found = peers
    name = f"ours/{library}/{number}"
    assert_agrees(made[library, number], x, found, name)
    again = sae.load(folder / name)
    assert (again.config.hook_name, again.config.lm_name) == (made[library, number].config.hook_name, "toy/lm")
    assert_agrees(again, x, found, name)


def test_a_dictionary_is_read_as_a_transcoder_where_it_is_one(peers):
    """Their classes take b_dec off whatever they are given; a transcoder of ours does not."""
    folder, x, _, found = peers
    for name in ("standard", "gated", "jumprelu"):
        one = sae.load(folder / "random" / name, hook_name="a->b")
        assert one.kind == "transcoder"
        assert_agrees(one, x, found, f"random/{name}")
    config = json.loads((folder / "random" / "topk" / "config.json").read_text())
    config["buffer"] = {"io": "in_and_out"}
    (folder / "random" / "topk" / "config.json").write_text(json.dumps(config))
    with pytest.raises(sae.UserError, match="hook_name"):
        sae.load(folder / "random" / "topk")
    assert_agrees(sae.load(folder / "random" / "topk", hook_name="a->b"), x, found, "random/topk")
