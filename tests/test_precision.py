"""With dtype="bfloat16" every large product is one of bfloat16s, by the lowered and compiled step.

What stays in float32 does so on purpose and is named here.
"""

import re
from collections import Counter

import jax
import pytest

from tests import tiny
from tests.sharded_run import STAGES, batches
from unclip_jax.errors import UserError
from unclip_jax.parallel import axes, sharding
from unclip_jax.plan import chips
from unclip_jax.weights.trained import in_dtype

# Layers whose products are of float32, by a part of their name. None is large: each is of one
# vector for an example, or has three or six features on one side.
ON_PURPOSE = {
    "norm": "means of groups, by a small matrix",
    "time/": "the timestep's embedding",
    "_to_emb/": "what is added to it",
    "conv_out/": "pixels, or the output's eps and variance",
    "_projection/": "CLIP's embeddings",
    "ie,": "CLIP's logits",
    "be,": "the dot product of two embeddings",
    "pool/out/": "the classifier's logits",
}
RESIZE = "dot_general"  # the whole name of jax.image.resize's, for low-resolution images


def gradient(stage, mesh=None):
    """The gradient of a stage's loss, of its params and a batch."""

    def of(network, params, batch, key):
        with axes.on(mesh):
            return stage.loss(params | {"network": network}, batch, key)[0]

    return jax.jit(jax.grad(of))


def arguments(stage, name):
    params, batch = tiny.params(STAGES[name]), batches(stage)[0]
    return params["network"], params, batch, jax.random.key(0)


def products(text: str) -> Counter:
    """Of a StableHLO text with locations, (operation, dtypes, name) of each product."""
    places = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.M))
    pattern = (
        r"stablehlo\.(convolution|dot_general).*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> .*"
        r"loc\((#loc\d+)\)"
    )
    found = Counter()
    for operation, left, right, place in re.findall(pattern, text):
        dtypes = tuple(x.split("x")[-1] for x in (left, right))
        found[operation, dtypes, places.get(place, "")] += 1
    return found


@pytest.mark.parametrize("name", STAGES)
def test_products_are_of_bfloat16_but_those_that_are_named(name):
    stage = in_dtype(STAGES[name], "bfloat16")
    found = products(gradient(stage).lower(*arguments(stage, name)).as_text(debug_info=True))
    wide = {place for _, dtypes, place in found if dtypes != ("bf16", "bf16")} - {RESIZE}
    assert len(found) - len(wide) >= (6 if name == "canvas" else 10)
    assert not [place for place in wide if not any(part in place for part in ON_PURPOSE)]


@pytest.mark.slow
def test_a_tpus_program_multiplies_at_full_precision_in_norms_alone():
    """By libtpu: elsewhere a product is one pass of bfloat16s, whatever its operands came as."""
    try:
        device = chips.Topology.parse("v5e:2x2").devices()[0]
    except UserError as error:
        pytest.skip(str(error))
    stage, mesh = in_dtype(STAGES["decoder"], "bfloat16"), sharding.make_mesh(devices=[device])
    where = sharding.replicated(mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        arguments(stage, "decoder"),
    )
    text = gradient(stage, mesh).lower(*shapes).compile().as_text()
    lines = [line for line in text.splitlines() if " convolution(" in line]  # matrices', too
    exact = [line for line in lines if "operand_precision=" in line]
    assert exact and len(lines) - len(exact) > 100
    for line in exact:
        assert re.search(r'op_name="[^"]*norm(_\w+)?/', line), line
