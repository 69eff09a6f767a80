"""What folder and file names of published releases say, and that other names say nothing."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import UserError
from sae.formats import (
    gemma_scope,
    gemma_scope_2,
    linear_relu,
    llama_scope,
    llama_scope_r1,
    mwhanna,
    openai,
    qwen_scope,
)
from sae.formats.clt import written_layer
from sae.formats.gemma_scope_2 import HOOKS, parse_hook
from sae.formats.settings import part

numbers = st.integers(0, 10**4)
words = st.text(st.characters(codec="ascii", exclude_characters="/\0"), max_size=30)
paths = st.lists(words, max_size=5).map(lambda parts: Path("/", *parts))
# Names of real folders with a character put in, taken out or changed.
REAL = ["gemma-scope-2b-pt-res", "layer_12", "width_16k", "average_l0_82", "SAE-Res-Qwen3-8B-Base-W64K-L0_50"]


@given(st.sampled_from(["2b", "9b", "27b"]), st.booleans(), st.sampled_from(list(gemma_scope.SITES)), numbers, numbers)
def test_gemma_scope(size, tuned, site, layer, l0):
    folder = f"gemma-scope-{size}-{'it' if tuned else 'pt'}-{site}/layer_{layer}/width_16k/average_l0_{l0}"
    found = gemma_scope.parse(Path("/somewhere", folder, "params.npz"))
    assert found.lm_name == f"google/gemma-2-{size}{'-it' if tuned else ''}"
    assert set(re.findall(r"blocks\.(\d+)\.", found.hook_name)) == {str(layer)}
    assert (found.width, found.l0) == ("width_16k", l0)
    assert gemma_scope.parse(Path("/models--google--" + folder)) == found


@given(st.sampled_from(REAL), st.integers(0, 30), st.sampled_from(["", "x", "-", "_"]))
def test_a_misspelt_name_says_nothing(name, at, put):
    changed = name[:at] + put + name[at + (1 if put == "" else 0) :]
    if changed == name or re.fullmatch(r".*\d.*", name[at : at + 1] + put):
        return  # a digit more or less is another name of the same kind
    path = Path("/", changed)
    assert gemma_scope.parse(path) == gemma_scope.Names(None, None, "", 0)
    assert qwen_scope.parse(path).k is None or "W64K-L0_50" in changed  # any model's name is a model's name


@given(paths)
def test_other_paths_say_nothing(path):
    assert gemma_scope.parse(path) == gemma_scope.Names(None, None, "", 0)
    assert gemma_scope_2.parse_folder(path) is None
    assert qwen_scope.parse(path) == qwen_scope.Names(None, None, None)
    assert (llama_scope.parse(path), llama_scope_r1.parse(path), openai.parse(path)) == (None, None, None)
    assert mwhanna.parse(path) == {}


def test_an_embedding_has_a_place_only_among_residual_sites():
    for site, hook_name in (("res", "hook_embed"), ("mlp", None), ("att", None), ("transcoders", None)):
        assert (
            gemma_scope.parse(Path(f"/gemma-scope-2b-pt-{site}/embedding/width_4k/average_l0_6")).hook_name == hook_name
        )


@given(st.integers(1, 10**7))
def test_widths_count_thousands_or_millions(d_sae):
    gemma_scope.check_width(Path("f"), f"width_{d_sae // 1000}k", d_sae)
    for wrong in (f"width_{d_sae // 1000 + 1}k", f"width_{d_sae // 10**6 + 1}m"):
        with pytest.raises(UserError, match=f"{d_sae} latents.*{wrong}"):
            gemma_scope.check_width(Path("f"), wrong, d_sae)


@pytest.mark.parametrize(
    ("name", "d_sae"),
    [
        ("4k", 2**12),
        ("16k", 2**14),
        ("32k", 2**15),
        ("65k", 2**16),
        ("131k", 2**17),
        ("262k", 2**18),
        ("524k", 2**19),
        ("1m", 2**20),
    ],
)
def test_published_widths_are_right(name, d_sae):
    gemma_scope.check_width(Path("f"), f"width_{name}", d_sae)


@given(st.sampled_from(list(HOOKS)), st.lists(numbers, min_size=1, max_size=6))
def test_gemma_scope_2_hooks(where, layers):
    listed = "{" + ",".join(map(str, layers)) + "}"
    for text, expected in ((str(layers[0]), (layers[0],)), (listed, tuple(layers)), ("{all}", None)):
        assert parse_hook(f"model.layers.{text}.{where}", Path("config.json")).layers == expected


@given(st.text(max_size=40) | st.sampled_from(["model.layers.3.outputs", "model.layers.{}.output", "layers.3.output"]))
def test_gemma_scope_2_hooks_that_are_none(text):
    with pytest.raises(UserError, match="names the hook point"):
        parse_hook(text, Path("config.json"))


@given(st.sampled_from(["resid_post", "attn_out", "mlp_out", "transcoder"]), st.booleans(), numbers, st.booleans())
def test_gemma_scope_2_folders_say_what_their_configs_say(kind, every, layer, affine):
    name = f"{kind}{'_all' if every else ''}/layer_{layer}_width_262k_l0_small{'_affine' if affine else ''}"
    found = gemma_scope_2.parse_folder(Path("/models--google--gemma-scope-2-1b-it/snapshots/ab12", name))
    assert found["model_name"] == "google/gemma-3-1b-it"
    assert found["affine_connection"] == affine
    assert (
        (found["hf_hook_point_in"] == found["hf_hook_point_out"]) == (kind != "transcoder") == (found["type"] == "sae")
    )
    assert f"model.layers.{layer}." in found["hf_hook_point_in"]


def test_gemma_scope_2_folders_of_several_layers():
    root = Path("/gemma-scope-2-1b-pt")
    crosscoder = gemma_scope_2.parse_folder(root / "crosscoder" / "layer_7_13_17_22_width_65k_l0_medium")
    assert crosscoder["hf_hook_point_in"] == "model.layers.{7,13,17,22}.output"
    clt = gemma_scope_2.parse_folder(root / "clt" / "width_262k_l0_big_affine")
    assert (clt["hf_hook_point_in"], clt["affine_connection"]) == (
        "model.layers.{all}.pre_feedforward_layernorm.output",
        True,
    )
    for wrong in (
        "resid_post/layer_7_13_width_65k_l0_big",
        "clt/layer_3_width_65k_l0_big",
        "resid_post/width_1k_l0_big",
    ):
        assert gemma_scope_2.parse_folder(root / wrong) is None


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        ("gemma-v3-12b-it", "google/gemma-3-12b-it"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
    ],
)
def test_gemma_3_names(said, name):
    assert gemma_scope_2.lm_name_of(said) == name


@given(st.sampled_from(["Qwen3-1.7B-Base", "Qwen3.5-27B", "Qwen3-30B-A3B-Base"]), numbers, numbers)
def test_qwen_scope(model, width, k):
    found = qwen_scope.parse(Path(f"/SAE-Res-{model}-W{width}K-L0_{k}/layer3.sae.pt"))
    assert found == qwen_scope.Names(f"Qwen/{model}", 1024 * width, k)


@given(st.sampled_from(list(openai.LOCATIONS)), st.sampled_from(["", "_v4", "_v5_32k", "_v5_128k"]), numbers)
def test_openai(location, version, layer):
    path = Path("/gpt2-small", location + version, "autoencoders", f"{layer}.pt")
    assert openai.parse(path) == openai.LOCATIONS[location].format(layer=layer)
    assert openai.parse(path.with_suffix(".pth")) is None


@given(st.from_regex(r"(Llama|DeepSeek|Phi)-[A-Za-z0-9.-]{1,12}", fullmatch=True), numbers)
def test_models_with_a_layer(model, layer):
    owner = {"L": "meta-llama/", "D": "deepseek-ai/", "P": ""}[model[0]]
    for ending in (".pt", ".pth"):
        assert linear_relu.parse(f"{model}-SAE-l{layer}{ending}") == linear_relu.Names(owner + model, layer)
    assert linear_relu.parse(f"{model}-SAE-l{layer}.safetensors") is None


@given(st.sampled_from(["0.6", "1.7", "4", "14"]), st.booleans())
def test_transcoder_sets(size, low):
    found = mwhanna.parse(Path(f"/x/qwen3-{size}b-transcoders{'-lowl0' if low else ''}"))
    assert found["model_name"] == f"Qwen/Qwen3-{size}B"


@settings(max_examples=30)
@given(words.filter(lambda name: name not in ("", ".", "..")), words)
def test_the_innermost_name_counts_and_the_hubs_cache_is_read_through(name, other):
    pattern = re.compile("right_(?P<which>.*)", re.DOTALL)
    assert part(Path("/right_a", "right_b", "x", f"models--o--{other}"), pattern)["which"] == "b" or "right" in other
    assert part(Path("/models--owner--right_c/snapshots"), pattern)["which"] == "c"
    assert part(Path("/not_right_c"), pattern) is None


@given(numbers, numbers)
def test_sites_of_cross_layer_transcoders(read, write):
    assert written_layer(f"blocks.{read}.hook_resid_mid->blocks.{write}.hook_mlp_out", read) == write
    with pytest.raises(UserError, match=f"reads layer {read}"):
        written_layer(f"blocks.{read}.hook_resid_mid->blocks.{write}.hook_mlp_out", read + 1)
    with pytest.raises(UserError, match="is not of the kind"):
        written_layer(f"blocks.{read}.hook_mlp_out", read)
