"""Sites: what is written is read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.autoencoder.site import Site
from sae.errors import UserError

NAMES = st.text("abc.123_", min_size=1, max_size=8)


@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_an_sae_or_crosscoder_reads_back(names):
    site = Site(tuple(names), tuple(names))
    assert Site.parse(str(site)) == site
    assert site.kind == ("sae" if len(names) == 1 else "crosscoder")
    assert list(site.hooks) == names


@given(NAMES, NAMES)
def test_a_transcoder_reads_back(read, write):
    if read == write:
        with pytest.raises(UserError, match="one other"):
            Site.parse(f"{read}->{write}")
        return
    site = Site.parse(f" {read} -> {write} ")
    assert site == Site((read,), (write,))
    assert Site.parse(str(site)) == site
    assert site.kind == "transcoder"
    assert site.folder == f"{read}-to-{write}"


@pytest.mark.parametrize("text", ["", "->", "a->", "+", "a+", "a->b->c", "a+b->c", "a->b+c", "a+a"])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match="site"):
        Site.parse(text)
