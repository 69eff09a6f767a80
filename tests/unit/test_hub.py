"""The hub's client, against a stand-in for the hub on this machine: each call in a process and cache of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_hub import serve

from sae.hub import HubName, parse

FETCH = """
import sys
from sae import hub
from sae.errors import UserError
try:
    print(hub.fetch(hub.parse(sys.argv[1])))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""

PUSH = """
import sys
from pathlib import Path
from sae import hub
from sae.errors import UserError
try:
    print(hub.push(Path(sys.argv[1]), "owner/new", path_in_repo="one", card="# A card"))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


@pytest.fixture
def local(tmp_path):
    for folder in ("one", "two"):
        place = tmp_path / "hub" / "owner" / "saes" / folder
        place.mkdir(parents=True)
        (place / "config.json").write_text(f'{{"name": "{folder}"}}')
        (place / "weights.bin").write_bytes(os.urandom(24_000_000 if folder == "one" else 1_000))
    with serve(tmp_path / "hub") as hub:
        yield hub


def fetch(tmp_path, name, endpoint, script=FETCH, **env):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"} | env
    done = subprocess.run(
        [sys.executable, "-c", script, name],
        env=os.environ | settings | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()[-1:] or [""]


def test_one_folder_is_downloaded_once_and_read_offline_after(local, tmp_path):
    status, path, err = fetch(tmp_path, "owner/saes:two", local.endpoint)
    assert status == 0, err
    assert sorted(os.listdir(path)) == ["config.json", "weights.bin"]
    original = local.root / "owner/saes/two/weights.bin"
    assert (Path(path) / "weights.bin").read_bytes() == original.read_bytes()
    assert not any(inside.startswith("one/") for _, inside, _ in local.requests), "nothing else is downloaded"
    n_gets = sum(method == "GET" for method, _, _ in local.requests)
    status, again, _ = fetch(tmp_path, "owner/saes:two", local.endpoint)
    assert (status, again) == (0, path)
    assert sum(method == "GET" for method, _, _ in local.requests) == n_gets, "what is there is not downloaded again"
    status, again, _ = fetch(tmp_path, "owner/saes:two", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert (status, again) == (0, path)
    status, _, err = fetch(tmp_path, "owner/saes:one", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert status == 1
    assert "is not in the cache" in err[0]
    assert "go online" in err[0]


def test_a_download_that_broke_off_goes_on(local, tmp_path):
    local.break_off.add("one/weights.bin")
    status, path, err = fetch(tmp_path, "owner/saes:one", local.endpoint)
    assert status == 0, err
    original = local.root / "owner/saes/one/weights.bin"
    assert (Path(path) / "weights.bin").read_bytes() == original.read_bytes()
    ranges = [wanted for method, inside, wanted in local.requests if method == "GET" and inside == "one/weights.bin"]
    assert any(wanted.startswith("bytes=") and wanted != "bytes=0-" for wanted in ranges), "from where it broke off"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("owner/nothing:one", "there is no repository 'owner/nothing'"),
        ("owner/saes@v9:one", "has no revision 'v9'"),
        ("owner/saes:three", "'three' of 'owner/saes' is not there"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(local, tmp_path, name, sentence):
    status, _, err = fetch(tmp_path, name, local.endpoint)
    assert status == 1
    assert err[0].startswith("UserError: ")
    assert sentence in err[0]


def test_a_gated_repository_says_how_to_get_in(local, tmp_path):
    local.gated.add("owner/saes")
    status, _, err = fetch(tmp_path, "owner/saes:one", local.endpoint)
    assert status == 1
    assert "is gated" in err[0]
    assert "HF_TOKEN" in err[0]


def test_what_is_pushed_is_there(local, tmp_path):
    folder = local.root / "owner" / "saes" / "two"
    status, _, err = fetch(tmp_path, str(folder), local.endpoint, PUSH, HF_TOKEN="wrong")
    assert status == 1
    assert "refuses access to 'owner/new'" in err[0]
    assert "HF_TOKEN" in err[0]
    assert not (local.root / "owner" / "new").exists()
    status, _, err = fetch(tmp_path, str(folder), "http://127.0.0.1:9", PUSH, HF_TOKEN="right")
    assert status == 1
    assert "was not uploaded, since the hub could not be reached" in err[0]
    status, out, err = fetch(tmp_path, str(folder), local.endpoint, PUSH, HF_TOKEN="right")
    assert status == 0, err
    assert out == "https://huggingface.co/owner/new"
    new = local.root / "owner" / "new"
    assert (new / "README.md").read_text() == "# A card"
    for name in ("config.json", "weights.bin"):
        assert (new / "one" / name).read_bytes() == (folder / name).read_bytes()


def test_without_a_network_it_says_so(tmp_path):
    status, _, err = fetch(tmp_path, "owner/saes:one", "http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1")
    assert status == 1
    assert "could not be reached" in err[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubName("a/b")),
        ("a/b:c/d", HubName("a/b", "c/d")),
        ("a/b@v1:c", HubName("a/b", "c", "v1")),
        ("a/b.c-d_e:layer_1/width_16k/", HubName("a/b.c-d_e", "layer_1/width_16k")),
        ("runs/demo/train", None),
        ("a", None),
        ("a/b:../../etc", None),
        ("", None),
        ("/a/b", None),
        ("a/b:", None),
    ],
)
def test_names(text, expected):
    assert parse(text) == expected


@given(st.text(max_size=30))
def test_any_text_is_a_name_or_none(text):
    found = parse(text)
    assert found is None or parse(str(found)) == found
