"""What is compiled for NVIDIA GPUs, with no GPU: jax's CUDA plugin has to be there, no driver."""

import json

import pytest

from tests.test_plan import run_python
from unclip_jax.errors import UserError
from unclip_jax.plan import cuda


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A bfloat16 decoder for 8 H100s, as `gpu_run` finds it."""
    try:
        cuda.check_compiler()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("plans")
    done = run_python("-m", "tests.gpu_run", UNCLIP_JAX_CACHE=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(products: dict[str, int], kind: str) -> dict[str, int]:
    """How many there are of a kind, by dtype."""
    return {name.rpartition(" ")[2]: n for name, n in products.items() if kind in name}


def test_attention_is_cudnns_forward_and_backward(decoder):
    step, sampler = decoder["step"]["products"], decoder["sampler"]["products"]
    assert of(step, "fmhaSoftmaxBackward")["bf16"] > 0
    assert of(step, "fmhaSoftmax")["bf16"] > of(step, "fmhaSoftmaxBackward")["bf16"]
    assert of(sampler, "fmhaSoftmax")["bf16"] > 0 and not of(sampler, "Backward")


def test_convolutions_and_products_are_in_bfloat16(decoder):
    """All but those that are float32 by design: what leaves to pixels, and the time's embedding."""
    for program in ("step", "sampler"):
        for kind in ("conv", "cublas"):
            found = of(decoder[program]["products"], kind)
            assert found["bf16"] >= 4 * sum(n for dtype, n in found.items() if dtype != "bf16")


def test_the_state_is_donated(decoder):
    assert decoder["step"]["donated"] >= decoder["state"]


def test_gradients_are_scattered(decoder):
    """Among the 4 devices that a copy is split over, and summed over the 2 copies."""
    kinds = {(c["kind"], c["group"]) for c in decoder["step"]["collectives"]}
    assert {("all-gather", 4), ("reduce-scatter", 4), ("all-reduce", 2)} <= kinds


def test_without_the_plugin_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(cuda.importlib.metadata, "distributions", lambda name: ())
    with pytest.raises(UserError, match=r"CUDA: jax's plugin is not installed.*pip install.*\[gpu"):
        cuda.devices(8, 1)
