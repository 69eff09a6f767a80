"""Heads and neurons lie in the matrices where the hook points say they do."""

import pytest
import torch
from tiny_lms import ARCHITECTURES, UNBRIDGED, save_checkpoint
from transformers import AutoModelForCausalLM

import sae
from sae.lm.matrices import block_matrices, heads, neurons, rows

TEXTS = ["hello there, you", "hi"]


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *UNBRIDGED])
def folder(request, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def lm(folder):
    return sae.load_lm(str(folder))


def zeroed(lm, batch, slices):
    """Logits with some slices at zero; everything is put back."""
    own = {matrix.name: matrix.parameter for matrix in block_matrices(lm)}
    before = {one.name: own[one.name].detach().clone() for one in slices}
    with torch.no_grad():
        for one in slices:
            one.of(own[one.name]).zero_()
        logits = lm.logits(batch)
        for name, values in before.items():
            own[name].copy_(values)
    return logits


def test_names_are_those_of_the_checkpoint(folder, lm):
    plain = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    found = block_matrices(lm)
    assert len({matrix.name for matrix in found}) == len(found) >= 4 * lm.n_layers
    for matrix in found:
        torch.testing.assert_close(matrix.parameter, plain[matrix.name])
        assert matrix.kind, matrix.name
        assert f".{matrix.layer}." in matrix.name
    inside = [name for name, values in plain.items() if values.ndim == 2 and any(f".{i}." in name for i in range(3))]
    assert {matrix.name for matrix in found} == set(inside)


def test_a_head_without_output_is_a_head_ablated(lm):
    batch = lm.tokenize(TEXTS)
    hook = "blocks.1.attn.hook_z"
    if hook not in lm.hook_names():
        pytest.skip("this model has hook points at its own modules only")
    parts = [part for part in heads(lm) if part.layer == 1]
    assert len(parts) == lm.bridge.cfg.n_heads
    size = lm.d_in(hook) // len(parts)
    for part in (parts[0], parts[-1]):
        own = slice(part.number * size, (part.number + 1) * size)

        def ablate(acts, step, own=own):
            acts = acts.clone()
            acts[..., own] = 0
            return acts

        with lm.edit({hook: ablate}):
            expected = lm.logits(batch)
        found = zeroed(lm, batch, part.slices[-1:])
        torch.testing.assert_close(found[batch.mask], expected[batch.mask])
        assert (found - lm.logits(batch))[batch.mask].abs().max() > 1e-3


def test_a_neuron_without_output_is_a_neuron_ablated(lm):
    batch = lm.tokenize(TEXTS)
    hook = "blocks.1.mlp.hook_post"
    parts = [part for part in neurons(lm) if part.layer == 1]
    if hook not in lm.hook_names():
        pytest.skip("this model has hook points at its own modules only")
    assert len(parts) == lm.d_in(hook)
    for part in (parts[0], parts[-1]):

        def ablate(acts, step, number=part.number):
            acts = acts.clone()
            acts[..., number] = 0
            return acts

        with lm.edit({hook: ablate}):
            expected = lm.logits(batch)
        torch.testing.assert_close(zeroed(lm, batch, part.slices[-1:])[batch.mask], expected[batch.mask])


def test_parts_do_not_overlap_and_cover_the_mlp(lm):
    matrices = block_matrices(lm)
    covered = {matrix.name: torch.zeros(matrix.parameter.shape, dtype=torch.int64) for matrix in matrices}
    for part in [*neurons(lm, matrices), *heads(lm, matrices)]:
        for one in part.slices:
            one.of(covered[one.name]).add_(1)
    for matrix in matrices:
        shared = matrix.kind in ("k", "v")  # by several heads, and then nobody's
        assert covered[matrix.name].max() <= 1
        assert shared or covered[matrix.name].min() == 1, matrix.name


def test_queries_that_lie_in_another_way_are_no_heads(lm):
    """As where each head's query has a gate beside it: rows of one head would be taken for those of two."""
    matrices = block_matrices(lm)
    named = {kind: index for index, matrix in enumerate(matrices) for kind in [matrix.kind] if matrix.layer == 1}
    kind = next(kind for kind in ("q", "qkv") if kind in named)
    own = matrices[named[kind]]
    wide = torch.nn.Parameter(torch.cat([own.parameter.detach()] * 2, dim=own.out_axis))
    matrices[named[kind]] = own._replace(parameter=wide)
    assert {part.layer for part in heads(lm, matrices)} == {part.layer for part in heads(lm)} - {1}


def test_rows_are_one_slice_each(lm):
    matrices = block_matrices(lm)
    found = rows(matrices[:2])
    assert len(found) == sum(matrix.parameter.shape[matrix.out_axis] for matrix in matrices[:2])
    assert found[1].label == f"{matrices[0].name}[1]"
