"""Costs per token, counted by hand for one small matrix and for Llama2-7B."""

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax import CodebookSpec, GroupUniformSpec, LowRankSignSpec, ResidualSignSpec, cost
from rabit_jax.weights.costs import Cost, dense_cost

I, O = 256, 512


def of(spec, lead=()):
    shape = jax.ShapeDtypeStruct((*lead, I, O), jnp.float32)
    return jax.eval_shape(spec.init, shape).cost()


def test_sign_paths_multiply_by_their_scales_alone():
    # Two paths: each scales 256 inputs and 512 outputs, and adds 256 x 512 signed inputs.
    want = Cost(2 * (256 + 512), 2 * 256 * 512, 0, 2 * (512 * 32 + 2 * (256 + 512)))
    assert of(ResidualSignSpec(k=2)) == want
    assert of(ResidualSignSpec(k=2), lead=(3,)) == Cost(*(3 * n for n in want))


def test_low_rank_signs_add_less_than_the_matrix_has_weights():
    # Rank 8, with the twin: two products 256 -> 8 -> 512, scaled before, between and after.
    found = of(LowRankSignSpec(rank=8))
    assert found[:3] == (2 * (256 + 8 + 512), 2 * 8 * (256 + 512), 0)
    assert found.bytes == 2 * (8 * (256 + 512) // 8 + 2 * (256 + 8 + 512))


def test_codebooks_are_read_once_a_vector_and_stage():
    # Two stages of vectors of 4 inputs: 2 x 64 x 512 reads.
    found = of(CodebookSpec(stages=2, dim=4, bits=4))
    assert found.lookups == 2 * 64 * 512 and found.multiplications == 256 * 512 + 512


def test_groups_multiply_by_a_step_and_a_lowest_level():
    assert of(GroupUniformSpec(group=128)).multiplications == 2 * 2 * 512


def test_a_tree_sums_its_weights_and_leaves_arrays_out():
    node = ResidualSignSpec(k=1, rounds=0).init(jnp.asarray(np.eye(I, O), jnp.float32))
    tree = {"a": {"kernel": node}, "b": {"kernel": node}, "norm": jnp.ones(4)}
    assert cost(tree) == Cost(*(2 * n for n in node.cost()))
    assert dense_cost((3, 4, 5)) == Cost(60, 60, 0, 120)
