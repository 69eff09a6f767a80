"""Every stage through the command line, on a tiny random model."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from sae.activations.store import StoreWriter
from sae.autoencoder.sae import SAE


def read(path):
    return json.loads(path.read_text())


def weights(run):
    return {
        str(path.relative_to(run)): load_file(path) for path in sorted((run / "train").rglob("weights.safetensors"))
    }


def same(one, two):
    return one.keys() == two.keys() and all(
        (one[name][key] == two[name][key]).all() for name in one for key in one[name]
    )


def test_a_grid_is_harvested_trained_evaluated_and_reported(sae):
    status, _, err = sae("eval", "name=grid", "sae.architecture=[topk,relu]")
    assert status == 0, err
    run = sae.folder / "grid"
    store = read(run / "harvest" / "store.json")
    assert store["hook_names"] == ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    assert store["n_tokens"] > 1000
    saes = read(run / "eval" / "result.json")["saes"]
    assert len(saes) == 2 * 2 * 2
    for entry in saes:
        assert 0 < entry["fvu"] < 1.5
        assert entry["kl"] >= 0
        assert entry["n_tokens"] > 100
        encoder = SAE.load(entry["path"])
        assert encoder.config.hook_name == entry["hook_name"]
        assert encoder.config.lm_fingerprint == store["lm_fingerprint"]
    assert (run / "train" / "blocks.0.hook_resid_post" / "topk-32-l0_4-s0" / "weights.safetensors").is_file()
    for stage in ("harvest", "train", "eval"):
        manifest = read(run / stage / "manifest.json")
        assert manifest["stage"] == stage
        assert manifest["versions"]["torch"]
    metrics = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert any(key.endswith("/fvu") for key in metrics[-1])
    status, _, err = sae("report", "name=grid", defaults=False)
    assert status == 0, err
    assert "blocks.1.hook_mlp_out" in (run / "report.html").read_text()


def test_finished_work_is_kept_and_force_does_it_again(sae):
    assert sae("train", "name=again")[0] == 0
    run = sae.folder / "again"
    before = weights(run)
    written = (run / "harvest" / "store.json").stat().st_mtime_ns
    curves = (run / "train" / "metrics.jsonl").read_text()
    sae_file = next((run / "train").rglob("weights.safetensors"))
    trained = sae_file.stat().st_mtime_ns
    status, out, err = sae("train", "name=again")
    assert status == 0, err
    assert out.count("done before") == 1
    assert (run / "harvest" / "store.json").stat().st_mtime_ns == written
    status, out, err = sae("eval", "name=again", "force=true")
    assert status == 0, err
    assert sae_file.stat().st_mtime_ns == trained, "measuring again must not delete what is measured"
    status, out, err = sae("train", "name=again", "force=true")
    assert status == 0, err
    assert f"{run / 'train'}: done before" not in out
    assert sae_file.stat().st_mtime_ns > trained
    assert (run / "harvest" / "store.json").stat().st_mtime_ns == written
    assert sae("harvest", "name=again", "force=true")[0] == 0
    assert (run / "harvest" / "store.json").stat().st_mtime_ns > written
    assert len((run / "train" / "metrics.jsonl").read_text().splitlines()) == len(curves.splitlines())
    assert same(weights(run), before), "the same seed gives the same weights"


@pytest.mark.parametrize("other", ["sae.l0=[5]", "data.n_tokens=1500", "harvest.hook_names=[blocks.0.hook_resid_post]"])
def test_what_took_long_is_never_replaced_unasked(sae, other):
    assert sae("train", "name=kept")[0] == 0
    run = sae.folder / "kept"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "recipe.json"}
    status, _, err = sae("eval", "name=kept", other)
    assert status == 2
    assert "choose another name=" in err
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_remembers_its_settings(sae):
    assert sae("train", "name=memory")[0] == 0
    status, out, err = sae("eval", "name=memory", defaults=False)
    assert status == 0, err
    assert out.count("done before") == 1
    assert len(read(sae.folder / "memory" / "eval" / "result.json")["saes"]) == 4


def test_the_store_may_be_deleted_after_training(sae):
    assert sae("train", "name=lean")[0] == 0
    shutil.rmtree(sae.folder / "lean" / "harvest")
    status, _, err = sae("eval", "name=lean")
    assert status == 0, err
    assert not (sae.folder / "lean" / "harvest").exists()


def test_a_killed_harvest_goes_on_only_as_it_was(sae, monkeypatch):
    add = StoreWriter.add

    def dies(self, acts, tokens):
        add(self, acts, tokens)
        self.flush()
        if self._passes_added == 3:
            raise KeyboardInterrupt

    assert sae("harvest", "name=whole")[0] == 0
    monkeypatch.setattr(StoreWriter, "add", dies)
    assert sae("harvest", "name=killed")[0] == 130
    monkeypatch.undo()
    status, _, err = sae("harvest", "name=killed", "harvest.batch_tokens=256")
    assert status == 2
    assert "another configuration" in err
    status, _, err = sae("harvest", "name=killed")
    assert status == 0, err
    stores = [read(sae.folder / name / "harvest" / "store.json") for name in ("whole", "killed")]
    assert stores[0]["checksums"] == stores[1]["checksums"]


@pytest.mark.parametrize(
    "change", [["data.include_special=true"], ["lm.dtype=bfloat16"], ["lm.chat_template={{ messages }}"]]
)
def test_nothing_that_changes_the_result_counts_as_done(sae, change):
    live = ("name=live", "train.stream=live", "train.live_buffer_tokens=1000")
    assert sae("train", *live)[0] == 0
    status, out, _ = sae("train", *live, *change)
    assert status == 2
    assert "done before" not in out


def test_live_training_needs_no_store(sae):
    status, _, err = sae("train", "name=live", "train.stream=live", "train.live_buffer_tokens=1000")
    assert status == 0, err
    assert not (sae.folder / "live" / "harvest").exists()
    assert len(weights(sae.folder / "live")) == 4


def test_a_multirun_gives_each_job_a_folder_and_shares_the_store(sae):
    assert sae("harvest", "name=sweep")[0] == 0
    status, _, err = sae("train", "-m", "name=sweep", "sae.seed=[0],[1]")
    assert status == 0, err
    run = sae.folder / "sweep"
    jobs = [weights(run / "job0"), weights(run / "job1")]
    assert len(jobs[0]) == len(jobs[1]) == 4
    assert jobs[0].keys() != jobs[1].keys()
    assert not (run / "job0" / "harvest").exists()


def test_steering_from_the_command_line(sae, model):
    assert sae("train", "name=steer")[0] == 0
    folder = sae.folder / "steer" / "train" / "blocks.0.hook_resid_post" / "topk-32-l0_4-s0"
    clamp = (f"steer.sae={folder}", "steer.latent=3", "steer.value=50", "steer.prompts=[the cat]")
    status, _, err = sae("steer", "name=steer", *clamp, "steer.max_new_tokens=4")
    assert status == 0, err
    found = read(sae.folder / "steer" / "steer" / "result.json")["generations"][0]
    assert found["plain"] != found["steered"]
    status, _, err = sae("steer", "name=steer", *clamp, "steer.latent=32")
    assert status == 2
    assert "latent 32" in err


def test_a_recipe_does_what_the_clamp_it_was_saved_from_did(sae, tmp_path):
    assert sae("train", "name=steer")[0] == 0
    folder = sae.folder / "steer" / "train" / "blocks.0.hook_resid_post" / "topk-32-l0_4-s0"
    prompts, result = "steer.prompts=[the cat]", sae.folder / "steer" / "steer" / "result.json"
    clamp = (f"steer.sae={folder}", "steer.latent=3", "steer.value=50", "steer.max_new_tokens=4")
    status, out, err = sae("steer", "name=steer", *clamp, prompts, f"steer.save={tmp_path / 'calm'}")
    assert status == 0, err
    assert str(tmp_path / "calm") in out
    clamped = read(result)
    status, _, err = sae("steer", "name=steer", f"recipe={tmp_path / 'calm'}", prompts, "steer.max_new_tokens=4")
    assert status == 0, err
    assert read(result)["generations"] == clamped["generations"]
    assert clamped["generations"][0]["plain"] != clamped["generations"][0]["steered"]
    assert read(result)["recipe"] == str(tmp_path / "calm")
    status, _, err = sae("steer", "name=steer", f"recipe={tmp_path / 'calm'}", *clamp, prompts)
    assert status == 2
    assert "leave one out" in err


def test_presets_compose():
    """Every YAML preset fills the schema."""
    from hydra import compose, initialize_config_dir

    from sae import config

    config.register()
    folder = config.configs_folder()
    # Contrast sets are data, read by `sae.behavior.sets`.
    groups = [path for path in folder.glob("*/*.yaml") if path.parent.name != "contrast"]
    assert groups
    with initialize_config_dir(str(folder), version_base=None):
        for path in folder.glob("*.yaml"):
            config.build(compose(path.stem))
        for path in groups:
            overrides = [f"{path.parent.name}={path.stem}"]
            if path.stem == "text":
                overrides.append("data.path=some.txt")
            config.build(compose("train", overrides=overrides))


def test_the_configuration_surface_is_frozen():
    """A key that goes or comes is a change users see: note it in CHANGELOG.md, then change this list."""
    from sae.config import keys

    top = [key for key in keys() if "." not in key]
    assert top == [
        "name", "runs", "lm", "data", "harvest", "sae", "train", "eval", "behavior", "circuit", "wiring", "steer",
        "localize", "mitigate", "convert", "organism", "log", "bench", "suite", "plugins", "plan", "force", "job",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["lm.name=no/such/model/folder"], "no/such/model/folder"),
        (["harvest.hook_names=[blocks.9.hook_resid_post]"], "blocks.9.hook_resid_post"),
        (["data.path=missing.txt"], "missing.txt"),
        (["sae.architecture=[topkk]"], "topkk"),
        (["sae.d_sae=[2]"], "d_sae = 2"),
        (["sae.d_sae=[]"], "d_sae"),
        (["train.bach_tokens=3"], "train.bach_tokens"),
        (["+extra=1"], "extra"),
        (["harvest.dtype=int3"], "int3"),
        (["train.total_tokens=1"], "train.total_tokens=1"),
        (["data.text_field=body"], "body"),
        (["name=a/b"], "a/b"),
        (["lm.device=tpu"], "tpu"),
        (["train.stream=disk"], "disk"),
        (["sae=nope"], "nope"),
        (["train.device=foo"], "foo"),
        (["train.seed=-1"], "train.seed=-1"),
        (["harvest.seed=-1"], "harvest.seed=-1"),
        (["train.log_every=0"], "log_every = 0"),
        (["train.encoder_dtype=int8"], "int8"),
        (["data.ctx_len=9999"], "9999"),
        (["lm.name=a(b"], "quote"),
        (["sae.d_sae=3,4"], "-m"),
    ],
)
def test_bad_input_stops_with_one_sentence_and_leaves_nothing(sae, overrides, named):
    status, _, err = sae("train", *overrides)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("sae:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert named in lines[0]
    left = [path for path in sae.folder.rglob("*") if path.is_file() and "tokens" not in path.parts]
    assert not [path for path in left if not path.name.endswith(".lock")], left


def test_bad_behavior_input(sae, tmp_path):
    assert sae("train", "name=b")[0] == 0
    status, _, err = sae("behavior", "name=b")
    assert status == 2
    assert "refusal" in err
    assert ".jsonl" in err
    empty, one_class = tmp_path / "empty.jsonl", tmp_path / "one.jsonl"
    empty.write_text("")
    record = {"messages": [{"role": "user", "content": "hi"}], "label": 1, "topic": "a"}
    record |= {"behavior_texts": ["no"], "alternative_texts": ["yes"]}
    one_class.write_text(json.dumps(record) + "\n")
    for path, words in ((empty, "holds no records"), (one_class, "add records of the other class")):
        status, _, err = sae("behavior", "name=b", f"behavior.contrast=[{path}]")
        assert status == 2, err
        assert words in err
        assert not (sae.folder / "b" / "behavior").exists()


def test_a_report_needs_a_run(sae):
    status, _, err = sae("report", "name=nosuch", defaults=False)
    assert status == 2
    assert "nosuch" in err
    assert not (sae.folder / "nosuch").exists()


def test_a_real_model_takes_the_demo_without_behaviours_and_the_scratch_run_begins_anew(sae):
    status, out, err = sae("demo")
    assert status == 0, err
    assert "the behaviour stage is left out" in out
    run = sae.folder / "demo"
    result = read(run / "result.json")
    assert result["behaviors"] == {}
    assert result["organism"] is None
    assert len(result["saes"]) == 4
    assert (run / "report.html").is_file()
    status, _, err = sae("demo", "sae.d_sae=[48]")
    assert status == 0, err
    assert {entry["d_sae"] for entry in read(run / "result.json")["saes"]} == {48}
    assert sae("demo", "name=mine")[0] == 0
    assert sae("demo", "name=mine", "sae.d_sae=[48]")[0] == 2


@pytest.mark.parametrize("stream", ["store", "live"])
def test_plan_says_what_a_run_takes_and_writes_nothing(sae, stream):
    status, out, err = sae("train", "plan=true", "name=planned", f"train.stream={stream}")
    assert status == 0, err
    assert "peak memory" in out
    assert "16 steps of 4 SAEs" in out
    status, _, err = sae("train", "plan=true", "name=planned", f"train.stream={stream}", "sae.d_sae=[500_000_000_000]")
    assert status == 2
    assert "fewer or narrower SAEs" in err
    status, _, err = sae("train", "name=planned", "sae.d_sae=[500_000_000_000]")
    assert status == 2
    assert not (sae.folder / "planned" / "harvest").exists(), "nothing is harvested for a grid that cannot fit"
    status, out, err = sae("train", "plan=true", "name=short", "train.total_tokens=256")
    assert status == 0, err
    assert "1 steps of 4 SAEs" in out
    status, _, err = sae("eval", "plan=true")
    assert status == 2
    assert "use `sae train`" in err
    status, _, err = sae("train", "plan=true", "name=other", "data.n_tokens=900_000_000_000_000")
    assert status == 2
    assert not (sae.folder / "other").exists()


def test_transcoders_crosscoders_and_controls_go_all_the_way(sae):
    read_at, write_at = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
    status, _, err = sae(
        "eval", "name=kinds", f'sae.sites=["{read_at}->{write_at}","{read_at}+{write_at}"]', "sae.d_sae=[32]",
        "sae.control=[none,random]", "harvest.hook_names=[]",
    )  # fmt: skip
    assert status == 0, err
    saes = read(sae.folder / "kinds" / "eval" / "result.json")["saes"]
    assert len(saes) == 2 * 2
    for entry in saes:
        assert 0 < entry["fvu"] < 2
        assert entry["kl"] >= 0
    status, _, err = sae("report", "name=kinds", defaults=False)
    assert status == 0, err
    status, _, err = sae(
        "eval", "name=kinds2", f'sae.sites=["{read_at}->blocks.7.hook_mlp_out"]', "harvest.hook_names=[]"
    )
    assert status == 2
    assert "blocks.7.hook_mlp_out" in err


def test_training_says_which_saes_are_controls(sae):
    one = ("name=two", "harvest.hook_names=[blocks.0.hook_resid_post]", "sae.d_sae=[32]")
    for controls, shown in (("none", None), ("none,frozen_encoder", ["none", "frozen_encoder"])):
        status, out, err = sae("train", *one, f"sae.control=[{controls}]", "force=true")
        assert status == 0, err
        saes = read(sae.folder / "two" / "train" / "result.json")["saes"]
        assert [entry["control"] for entry in saes] == controls.split(",")
        lines = [line.split() for line in out.splitlines()]
        header = next(words for words in lines if words[:1] == ["hook_name"])
        assert header == ["hook_name", "architecture", "d_sae", "l0", "fvu", "n_dead", *(["control"] if shown else [])]
        if shown:
            rows = [words for words in lines if words[:2] == ["blocks.0.hook_resid_post", "topk"]]
            assert [words[-1] for words in rows] == shown


def test_ground_truth_is_measured_on_worlds(sae, monkeypatch):
    """The stage on one world for a moment; what SAEs reach there is tested elsewhere."""
    from sae.evals import worlds
    from sae.stages import ground_truth

    trial = ground_truth.Trial(
        worlds.t1, 16, (("batch_topk", 4), ("relu", 4)), 300_000, lr=1e-2, controls=("", "random")
    )
    monkeypatch.setitem(ground_truth.SUITES, "ground_truth_quick", ((trial,), (0,)))
    status, out, err = sae("eval", "name=truth", "suite=ground_truth_quick")
    assert status == 0, err
    rows = read(sae.folder / "truth" / "eval" / "ground_truth_quick" / "result.json")["worlds"]
    assert [(row["architecture"], row["control"]) for row in rows] == [
        ("batch_topk", "none"),
        ("batch_topk", "random"),
        ("relu", "none"),
    ]
    fields = {"world", "architecture", "k", "seed", "mcc", "mmcs", "f1", "fve", "l0", "shrinkage"}
    assert all(row.keys() >= fields for row in rows)
    assert rows[0]["mcc"] > rows[1]["mcc"] + 0.2, "a random dictionary has not found the features"
    assert rows[0]["true_l0"] == pytest.approx(4, abs=0.05)
    assert "mcc" in out
    status, _, err = sae("eval", "name=truth", "suite=ground")
    assert status == 2
    assert "ground_truth_quick" in err
