"""Every field of diffusers' configs of a Karlo is honoured, or refused by its name."""

import inspect

import pytest

from tests import karlo_folders
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import karlo_configs as configs

diffusers = karlo_folders.diffusers
SIZES = karlo_folders.SIZES["two levels"]
DECODER, SUPER_RES = SIZES.decoder, SIZES.super_res
TEXT_PROJ = configs.text_proj_settings(DECODER)


def read_text_proj(given, where):
    return configs.read_decoder(configs.decoder_settings(DECODER.unet), given, where)


def read_decoder(given, where):
    return configs.read_decoder(given, TEXT_PROJ, where)


def read_scheduler(given, where):
    return configs.read_scheduler(given, "5", where)


def text_proj_class():
    from diffusers.pipelines.unclip import UnCLIPTextProjModel

    return UnCLIPTextProjModel


KINDS = {
    "prior": (
        diffusers.PriorTransformer,
        configs._PRIOR,
        configs.prior_settings(SIZES.prior),
        configs.read_prior,
    ),
    "decoder": (
        diffusers.UNet2DConditionModel,
        configs.CONDITIONED,
        configs.decoder_settings(DECODER.unet),
        read_decoder,
    ),
    "super_res": (
        diffusers.UNet2DModel,
        configs._SUPER_RES,
        configs.super_res_settings(SUPER_RES),
        configs.read_super_res,
    ),
    "text_proj": (text_proj_class(), configs._TEXT_PROJ, TEXT_PROJ, read_text_proj),
    "scheduler": (diffusers.UnCLIPScheduler, configs._SCHEDULER, {}, read_scheduler),
}
# Of no consequence: what drops features in training, and what no block of Karlo's reads.
WITHOUT_EFFECT = {"dropout", "downsample_type", "upsample_type"}


def fields(kind):
    signature = inspect.signature(KINDS[kind][0].__init__)
    return {name: p.default for name, p in signature.parameters.items() if name != "self"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_is_left_out_is_as_diffusers_takes_it(kind):
    known = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields(kind).items()
        if value is not inspect.Parameter.empty
    }
    assert known == KINDS[kind][1]


def other(value):
    """Something else of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value or 1
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    return "another"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_honoured_or_refused(kind):
    _, defaults, settings, read = KINDS[kind]
    settings = defaults | settings
    ours = read(settings, "config.json")
    for name, value in settings.items():
        try:
            changed = 2 if name == "norm_num_groups" else other(value)
            found = read(settings | {name: changed}, "config.json")
        except UserError as error:
            assert name in str(error) or "text_proj: " in str(error)  # the two do not fit
        else:
            without = name in WITHOUT_EFFECT or (kind, name) == ("super_res", "attention_head_dim")
            assert (found == ours) == without, name


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "prior",
            {"_class_name": "UNet2DModel"},
            "_class_name: got 'UNet2DModel', expected one of",
        ),
        ("decoder", {"class_embed_type": None}, "class_embed_type is None"),
        ("decoder", {"new_field": 3}, "field 'new_field' is 3"),
        ("decoder", {"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ("super_res", {"layers_per_block": [1, 1]}, "layers_per_block"),
        ("super_res", {"block_out_channels": [12, 30]}, "block_out_channels.*multiples of"),
        ("scheduler", {"clip_sample_range": 0}, "clip_sample_range: got 0"),
        ("scheduler", {"variance_type": "fixed_small"}, "variance_type: got 'fixed_small'"),
        ("scheduler", {"num_train_timesteps": 1000.5}, "num_train_timesteps: got 1000.5"),
        ("scheduler", {"_class_name": "DDPMScheduler"}, "_class_name: got 'DDPMScheduler'"),
    ],
)
def test_what_no_network_of_ours_does(kind, change, message):
    _, _, settings, read = KINDS[kind]
    with pytest.raises(UserError, match=message):
        read(settings | change, "config.json")


def test_what_says_the_same_is_taken():
    """None spelled out, a range that nothing is clipped at."""
    settings = configs.prior_settings(SIZES.prior)
    e, width = SIZES.prior.embed_dim, SIZES.prior.width
    spelled = {"embedding_proj_dim": e, "clip_embed_dim": e, "time_embed_dim": width}
    assert configs.read_prior(settings | spelled, "") == configs.read_prior(settings, "")
    unclipped = read_scheduler({"clip_sample": False}, "")
    assert read_scheduler({"clip_sample": False, "clip_sample_range": 5.0}, "") == unclipped
    assert unclipped[1].clip_x_0 == 0
