"""Adapters alone in a file: what they change, how much, and whose they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from unclip_jax.common import config as settings
from unclip_jax.common.params import flatten, unflatten
from unclip_jax.errors import UserError
from unclip_jax.models import low_rank
from unclip_jax.pipeline.drawing import sample_stage
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.training import lora, save
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.training.lora import Lora
from unclip_jax.weights import adapters
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import in_dtype, load_part

CONFIG = Lora(rank=2, alpha=4.0)


def trained(part, seed, size=0.2):
    """Adapters that have learned something."""
    shapes = jax.eval_shape(lambda: lora.init(CONFIG, jax.random.key(0), part.params["network"]))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: size * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two of the tiny model's prior, one of its decoder's."""
    root, model = tmp_path_factory.mktemp("lora"), tiny.model()
    for name, part, seed in (("a", "prior", 1), ("b", "prior", 2), ("hats", "decoder", 3)):
        part = getattr(model, part)
        told = {"about": {"step": 7}}
        adapters.save_adapters(
            root / f"{name}.safetensors", part, trained(part, seed), CONFIG.scale, **told
        )
    return {path.stem: path for path in root.iterdir()}


def changed_by_hand(part, changes):
    """W + sum of weight * scale * A B, in float64."""
    network = {n: np.asarray(x, np.float64) for n, x in flatten(part.params["network"]).items()}
    for seed, weight in changes:
        flat = flatten(trained(part, seed))
        for name in (name for name in flat if name.endswith(low_rank.A)):
            where = name.removesuffix(low_rank.A)
            product = np.matmul(np.float64(flat[name]), flat[where + low_rank.B])
            kernel = network[where + "kernel"]
            network[where + "kernel"] = kernel + weight * 2 * product.reshape(kernel.shape)
    return network


def test_several_files_change_the_weights_each_by_its_weight(files):
    model = tiny.model()
    blended = model.with_lora({files["a"]: 0.5, files["b"]: -1.5, str(files["hats"]): 1})
    for name, changes in (("prior", [(1, 0.5), (2, -1.5)]), ("decoder", [(3, 1.0)])):
        found = flatten(getattr(blended, name).params["network"])
        expected = changed_by_hand(getattr(model, name), changes)
        assert found.keys() == expected.keys()
        for where, value in expected.items():
            np.testing.assert_allclose(found[where], value, atol=1e-5, err_msg=where)
    assert blended.upsamplers == model.upsamplers and blended.clip is model.clip
    same = model.with_lora({files["a"]: 0.0}).prior.params["network"]
    jax.tree.map(np.testing.assert_array_equal, same, model.prior.params["network"])


def narrow(part):
    """A part with its weights in bfloat16."""
    cast = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    params = part.params | {"network": jax.tree.map(cast, part.params["network"])}
    return part._replace(stage=in_dtype(part.stage, "bfloat16"), params=params)


def test_rounded_weights_keep_adapters_beside_them_and_are_saved_whole(files, tmp_path):
    """Of the same model in bfloat16; what `save` writes has them in its kernels."""
    model = dataclasses.replace(tiny.model(), prior=narrow(tiny.model().prior))
    blended = model.with_lora({files["a"]: 0.5, files["b"]: -1.5})
    flat = flatten(blended.prior.params["network"])
    pairs = [name for name in flat if name.endswith(low_rank.A)]
    assert pairs and all(flat[name].shape[-1] == 4 for name in pairs)  # two of rank 2
    blended.save(tmp_path / "model")
    found = UnCLIP.load(tmp_path / "model").prior
    expected = changed_by_hand(model.prior, [(1, 0.5), (2, -1.5)])
    for where, value in flatten(found.params["network"]).items():
        np.testing.assert_allclose(value, expected[where], atol=1e-5, err_msg=where)
    assert "adapters" not in found.description


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_weight_compiles_nothing(files, dtype):
    model = tiny.model()
    if dtype == "bfloat16":
        model = dataclasses.replace(model, prior=narrow(model.prior))
    keys, drawn = jax.random.split(jax.random.key(0), 1), []
    programs = (sample_stage, adapters._added, adapters._stacked, adapters._marks)

    def count():
        return sum(p.programs() if p is sample_stage else p._cache_size() for p in programs)

    for weights in ((1.0, 0.5), (0.25, np.float32(2)), (0, -1)):
        blended = model.with_lora(dict(zip((files["a"], files["b"]), weights, strict=True)))
        drawn.append(np.asarray(blended.sample_prior(keys, ["a dog"])))
        before = before if len(drawn) > 1 else count()  # noqa: F821
    assert count() == before
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def refused(message, model, chosen):
    with pytest.raises(UserError, match=message):
        model.with_lora(chosen)


def test_adapters_of_another_model_are_refused(files, tmp_path):
    model = tiny.model()
    other = model.prior._replace(params=tiny.params(tiny.PRIOR, 9))
    refused(
        "trained beside other weights", dataclasses.replace(model, prior=other), {files["a"]: 1}
    )
    without = dataclasses.replace(model, prior=None)
    refused("expected of one of this model's parts: decoder", without, {files["a"]: 1})
    wider = dataclasses.replace(tiny.PRIOR, model=dataclasses.replace(tiny.PRIOR.model, width=32))
    wide = model.prior._replace(stage=wider, params=tiny.params(wider))
    refused("with other kernels", dataclasses.replace(model, prior=wide), {files["a"]: 1})
    refused("has some in it already", model.with_lora({files["a"]: 1}), {files["b"]: 1})
    near = flatten(model.prior.params["network"])
    name = next(n for n in near if n.endswith("kernel") and near[n].ndim > 1)
    near = unflatten(near | {name: 1.05 * near[name]})
    moved = model.prior._replace(params=model.prior.params | {"network": near})
    refused("of 1 of ", dataclasses.replace(model, prior=moved), {files["a"]: 1})


def test_what_is_no_file_of_adapters_is_named(files, tmp_path):
    model = tiny.model()
    refused("no such file", model, {tmp_path / "none.safetensors": 1})
    refused("weight of .*: got nan", model, {files["a"]: float("nan")})
    refused("weight of .*: got '1'", model, {files["a"]: "1"})
    text = tmp_path / "text.safetensors"
    text.write_text("hello, this is no file of tensors")
    refused("damaged or cut short", model, {text: 1})
    model.save(tmp_path / "model")
    refused(
        "no adapters of this package's", model, {tmp_path / "model/prior/params.safetensors": 1}
    )
    data = bytearray(files["a"].read_bytes())
    data[-3] ^= 64
    (tmp_path / "bit.safetensors").write_bytes(data)
    refused("damaged, it is not as it was written", model, {tmp_path / "bit.safetensors": 1})
    with pytest.raises(UserError, match="name that ends in"):
        adapters.save_adapters(tmp_path / "a.bin", model.prior, trained(model.prior, 1), 1.0)


def test_adapters_trained_with_another_canvas_are_refused(tmp_path):
    own, other = ({"canvas": {"fingerprint": digit * 16}} for digit in "12")
    plain, path = tiny.model().decoder, tmp_path / "a.safetensors"
    made = plain._replace(stage=tiny.ON_CANVAS, params=tiny.params(tiny.ON_CANVAS))
    adapters.save_adapters(path, made, trained(made, 1), 1.0, own)
    found = adapters.read_adapters(path)
    for described in (own, {}):  # one that was fine-tuned without config.canvas says nothing of it
        adapters.check(found, made._replace(description=described))
    for part in (made._replace(description=other), plain):
        with pytest.raises(UserError, match="trained with another canvas"):
            adapters.check(found, part)


def test_a_run_of_adapters_writes_them_for_the_folder_it_began_from(tmp_path):
    """What training makes beside frozen weights in bfloat16, on the same weights in float32."""
    part = tiny.model().prior
    model_folder.save_stage(tmp_path / "prior", params=part.params, description=part.description)
    origin = Origin.read(str(tmp_path / "prior"), {"kind": "prior"})
    params = origin.adapted(CONFIG, jax.random.key(0)) | {"network": trained(part, 4)}
    about = {"lora": settings.to_dict(CONFIG), "step": 3, "train": {}}
    path = tmp_path / "run" / "lora.safetensors"
    save.save_adapters(path, params, about, origin)
    found = adapters.read_adapters(path)
    assert (found.kind, found.about) == ("prior", {"lora": about["lora"], "step": 3})
    loaded = load_part(tmp_path / "prior")
    whole = flatten(origin.merged(CONFIG, params)["network"])
    blended = flatten(adapters.blended(loaded, [(found, 1.0)]).params["network"])
    for name, value in whole.items():
        np.testing.assert_allclose(blended[name], value, atol=1e-5, err_msg=name)
    with pytest.raises(UserError, match="this run trains no adapters"):
        save.save_adapters(path, params, {"step": 3}, origin)
