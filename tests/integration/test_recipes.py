"""Every preset of SAEs composes into a grid that trains."""

import pytest
from hydra import compose, initialize_config_dir

from sae import config
from sae.autoencoder.sparsity import check_options
from sae.stages.train import make_settings
from sae.train.grid import grid

PRESETS = sorted(path.stem for path in (config.configs_folder() / "sae").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_and_names_its_source(preset):
    config.register()
    with initialize_config_dir(str(config.configs_folder()), version_base=None):
        built = config.build(compose("train", overrides=[f"sae={preset}", "train.total_tokens=600_000_000"]))
    make_settings(built)
    chosen = built.sae
    check_options(chosen.options, chosen.architecture)
    assert len(grid(["h"], chosen.d_sae, chosen.architecture, chosen.l0, chosen.seed)) == 1
    text = (config.configs_folder() / "sae" / f"{preset}.yaml").read_text()
    if len(text.splitlines()) > 1:
        assert any(mark in text for mark in ("24", "25", "Anthropic")), "a recipe says where it comes from"


def test_presets_cover_every_architecture():
    from sae.autoencoder.sparsity import trainable_architectures

    assert set(trainable_architectures()) <= set(PRESETS)
