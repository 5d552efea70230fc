"""What is compiled for NVIDIA GPUs, with no GPU: jax's CUDA plugin has to be there, no driver."""

import json

import pytest

from tests import gpu_run
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


def of(decoder, kind: str) -> dict[str, list[int]]:
    """How many products there are of a kind, and the largest's bytes, by dtype."""
    products = decoder["step"]["products"].items()
    return {name.rpartition(" ")[2]: told for name, told in products if kind in name}


def test_attention_is_cudnns_forward_and_backward(decoder):
    kernels = [name for name in decoder["step"]["products"] if "fmha" in name]
    assert sorted(name.endswith("Backward bf16") for name in kernels) == [False, True]
    assert all(name.endswith(" bf16") for name in kernels)


def test_convolutions_and_products_are_in_bfloat16(decoder):
    """But for the pixels' convolution and what is small: embeddings, sums over a norm's groups."""
    for kind in ("convForward", "convBackwardFilter"):
        found = of(decoder, kind)
        assert found["f32"][0] <= 1 and found["bf16"][0] > 8
    rows = 16 // 8
    found = of(decoder, "cublas")
    assert found["f32"][1] <= 4 * (4 * gpu_run.CHANNELS) ** 2
    assert found["bf16"][1] >= 2 * rows * gpu_run.SIDE**2 * gpu_run.CHANNELS


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
