"""CLIP from every publisher: the same pictures and captions get the same embeddings."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests import karlo_folders
from tests.clip_files import (
    CONFIG,
    IMAGES,
    TOKENS,
    TOLERANCE,
    check_embeddings,
    embeddings,
    openclip_settings,
    pixels_of,
    save_openclip,
    their_clip,
)
from tests.networks import normal, relative_error
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import clip, clip_configs
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.trained import load_part, tokenizer

torch, transformers = karlo_folders.torch, karlo_folders.transformers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["TorchScript", "state dict"])
def test_openai(form, tmp_path):
    """Sizes come from the shapes alone; the constants beside the weights are left out."""
    model = their_clip("quick_gelu")
    path = tmp_path / "ViT.pt"
    if form == "TorchScript":
        inputs = pixels_of(IMAGES), torch.from_numpy(np.array(TOKENS)).long()
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    else:
        torch.save(model.state_dict(), path)
    part = clip.load(path)
    assert part.stage.model == CONFIG
    check_embeddings(part, *embeddings(model))


def test_openai_in_half_precision(tmp_path):
    """Its files are: the matrices in float16, the norms in float32."""
    model = their_clip("quick_gelu")
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data.half()
    torch.save(model.state_dict(), tmp_path / "ViT.pt")
    part = clip.load(tmp_path / "ViT.pt")
    assert part.params["network"]["vision"]["patches"]["kernel"].dtype == np.float32
    check_embeddings(part, *embeddings(model.float()))


@pytest.mark.parametrize("quick", [True, False])
def test_openclip(quick, tmp_path):
    config = dataclasses.replace(CONFIG, activation="quick_gelu" if quick else "gelu")
    model, settings = their_clip(config.activation), openclip_settings(config)
    save_openclip(model, tmp_path, settings)
    part = clip.load(tmp_path)
    assert part.stage.model == config
    check_embeddings(part, *embeddings(model))
    settings["vision_cfg"]["timm_model_name"] = "convnext"
    save_openclip(model, tmp_path, settings)
    with pytest.raises(UserError, match="timm_model_name"):
        clip.load(tmp_path)


# As bigG and g are: other heads, and a perceptron of another width in the image tower.
ODD = dataclasses.replace(
    CONFIG, activation="gelu", vision_width=104, vision_heads=1, vision_mlp_ratio=4.9231
)


def test_openclip_with_odd_heads_and_its_own_pixels(tmp_path):
    pixels = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.3, 0.4)}
    config = dataclasses.replace(ODD, **pixels, resize_mode="longest", fill=127)
    model = their_clip("gelu", config)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "random"}
    preprocess |= {"resize_mode": "longest", "fill_color": 127, "size": [14, 14], "mode": None}
    save_openclip(model, tmp_path, openclip_settings(config), preprocess)
    part = clip.load(tmp_path)
    assert part.stage.model == config
    check_embeddings(part, *embeddings(model, config))
    preprocess |= {"resize_mode": "squash", "interpolation": "bilinear"}
    save_openclip(model, tmp_path, openclip_settings(config), preprocess)
    model = clip.load(tmp_path).stage.model
    assert (model.resize_mode, model.interpolation) == ("squash", "bilinear")


def test_two_preparations_of_the_same_weights_are_two_clips(tmp_path):
    """Stored embeddings of the one are not those of the other."""
    model, marks = their_clip("gelu"), set()
    for preprocess in ({}, {"mean": [0.5] * 3}, {"resize_mode": "squash"}):
        save_openclip(model, tmp_path, openclip_settings(), preprocess)
        marks.add(clip.load(tmp_path).description["fingerprint"])
    assert len(marks) == 3


OTHERS = [
    ("vision_cfg", {"layers": [3, 4, 6, 3]}, r"vision_cfg.layers: got \[3.*no ResNet"),
    ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type: got 'avg'"),
    ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool: got True"),
    ("vision_cfg", {"no_ln_pre": True}, "no_ln_pre"),
    ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs"),
    ("vision_cfg", {"ls_init_value": 0.1}, "ls_init_value"),
    ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask: got True"),
    ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type: got 'last'"),
    ("text_cfg", {"embed_cls": True}, "embed_cls"),
    ("text_cfg", {"hf_model_name": "xlm-roberta-base"}, "hf_model_name"),
    ("text_cfg", {"hf_tokenizer_name": "bert-base"}, "hf_tokenizer_name"),
    ("text_cfg", {"width": "64"}, "text_cfg.width: got '64'"),
    ("multimodal_cfg", {"width": 8}, "model_cfg.multimodal_cfg"),  # CoCa
    ("", {"init_logit_bias": -10}, "model_cfg.init_logit_bias: got -10"),  # SigLIP
    ("", {"text_cfg": None}, "text_cfg: got None, expected the settings of a tower"),
]


@pytest.mark.parametrize(("where", "change", "message"), OTHERS)
def test_what_is_no_plain_clip_of_openclip_is_refused_by_the_field(
    where, change, message, tmp_path
):
    settings = openclip_settings()
    (settings.setdefault(where, {}) if where else settings).update(change)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(UserError, match=message):
        clip.load(tmp_path)


def test_fields_of_openclip_without_effect_are_passed_over(tmp_path):
    """Defaults spelled out, the text tower under a name of its own, a checkpoint of training."""
    model, settings = their_clip("quick_gelu"), openclip_settings() | {"custom_text": True}
    settings["vision_cfg"] |= {"pool_type": "tok", "patch_dropout": 0.5, "no_ln_pre": False}
    settings["text_cfg"] |= {"pool_type": "argmax", "proj_type": "linear", "eos_id": 2}
    text = ("transformer.", "token_embedding.", "positional_", "ln_final.", "text_projection")
    state = {
        "module." + "text." * name.startswith(text) + name: tensor
        for name, tensor in model.state_dict().items()
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    checkpoint = {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.zeros(2)}}}
    torch.save(checkpoint, tmp_path / "open_clip_pytorch_model.bin")
    part = clip.load(tmp_path)
    assert part.stage.model == CONFIG
    check_embeddings(part, *embeddings(model))


def test_pictures_that_are_no_whole_patches(tmp_path):
    """Both leave out what no patch covers, at the right and at the bottom."""
    text, vision = karlo_folders.clip_settings(CONFIG)
    vision["image_size"] = 17
    settings = transformers.CLIPConfig(
        projection_dim=CONFIG.embed_dim, text_config=text, vision_config=vision
    )
    model = karlo_folders.randomise(transformers.CLIPModel(settings), 0)
    model.save_pretrained(tmp_path)
    images = jnp.tanh(normal(0, 2, 17, 17, 3))
    with torch.no_grad():
        seen = model.vision_model(pixels_of(images)).pooler_output
        expected = model.visual_projection(seen)
    part = clip.load(tmp_path)
    assert (part.stage.model.image_size, part.stage.model.margin) == (17, 3)
    stage = dataclasses.replace(part.stage, unit_embeddings=False)
    assert relative_error(stage.encode_image(part.params, images), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"resize_mode": "fit"}, "resize_mode: got 'fit', expected one of shortest, squash"),
        ({"interpolation": "area"}, "interpolation: got 'area', expected one of bicubic"),
        ({"mode": "L"}, "preprocess_cfg.mode: got 'L'"),
        ({"fill_color": -1}, "fill_color: got -1"),
        ({"mean": 0.5}, "mean of the pixels: got 0.5, expected three numbers"),
        ({"size": 28}, "preprocess_cfg.size: got 28, expected vision_cfg.image_size = 14"),
    ],
)
def test_pictures_prepared_in_another_way_are_refused(preprocess, message, tmp_path):
    save_openclip(their_clip("gelu"), tmp_path, openclip_settings(), preprocess)
    with pytest.raises(UserError, match=message):
        clip.load(tmp_path)


def test_an_arch_that_is_not_the_files(tmp_path):
    """Heads are in no shape, but those of published widths are known."""
    wide = dataclasses.replace(CONFIG, vision_width=1280, vision_heads=16, activation="gelu")
    save_openclip(their_clip("gelu", wide), tmp_path, openclip_settings(wide))
    for arch in ("openai", "ViT-L-14", "ViT-B-32-quickgelu"):
        with pytest.raises(UserError, match=r"the 80 features.* as wide as 1280; give ViT-H-14"):
            clip.load(tmp_path / "open_clip_model.safetensors", arch=arch)
    assert clip.load(tmp_path / "open_clip_model.safetensors", arch="ViT-H-14").stage.model == wide
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(
        UserError, match=r"no config.json or open_clip.*found open_clip_model.*itself"
    ):
        clip.load(tmp_path)
    torch.save(their_clip("quick_gelu").state_dict(), tmp_path / "ViT.pt")
    with pytest.raises(UserError, match=r"arch: got 'ViT-B-32', expected none.*OpenAI's"):
        clip.load(tmp_path / "ViT.pt", arch="ViT-B-32")


def test_a_file_that_does_not_say_what_it_is(tmp_path, capsys):
    model = their_clip("gelu", ODD)
    save_openclip(model, tmp_path, openclip_settings(ODD))
    file = tmp_path / "open_clip_model.safetensors"
    with pytest.raises(UserError, match=r"does not say its activation.*give the folder.*--arch"):
        clip.load(file)
    with pytest.raises(UserError, match="arch: got 'ViT-H-14', but the folder"):
        clip.load(tmp_path, arch="ViT-H-14")
    with pytest.raises(UserError, match="arch: got 'RN50', expected one of openai, ViT-B-32"):
        clip.load(file, arch="RN50")
    with pytest.raises(UserError, match="--arch: got 'openai', expected one with heads that"):
        clip.load(file, arch="openai")
    convert(["clip", str(file), "--out", str(tmp_path / "ours"), "--arch", "ViT-bigG-14"])
    assert "does not say how pictures are prepared" in capsys.readouterr().out
    part = load_part(tmp_path / "ours")
    assert (part.stage.model.activation, part.stage.model.vision_heads) == ("gelu", 1)
    check_embeddings(part, *embeddings(model))


def test_of_two_layouts_the_one_with_weights_counts(tmp_path):
    """Hugging Face's weights beside OpenCLIP's settings, and the other way round."""
    theirs, other = huggingface(), their_clip("quick_gelu")
    theirs.save_pretrained(tmp_path)
    settings = openclip_settings()
    save_openclip(other, tmp_path / "openclip", settings)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    check_embeddings(clip.load(tmp_path), *hf_embeddings(theirs))
    weights = "open_clip_model.safetensors"
    (tmp_path / "openclip" / weights).rename(tmp_path / weights)
    check_embeddings(clip.load(tmp_path), *embeddings(other))
    (tmp_path / "model.safetensors").unlink()
    check_embeddings(clip.load(tmp_path), *embeddings(other))
    (tmp_path / weights).unlink()
    with pytest.raises(UserError, match="no weights"):
        clip.load(tmp_path)


def huggingface(activation="quick_gelu", text_changes=None, **vision_changes):
    text, vision = karlo_folders.clip_settings(dataclasses.replace(CONFIG, activation=activation))
    text, vision = text | (text_changes or {}), vision | vision_changes
    settings = transformers.CLIPConfig(
        projection_dim=CONFIG.embed_dim, text_config=text, vision_config=vision
    )
    return karlo_folders.randomise(transformers.CLIPModel(settings), 0)


def hf_embeddings(model, config=CONFIG, tokens=TOKENS):
    with torch.no_grad():
        text = model.text_model(torch.from_numpy(np.array(tokens)))
        vision = model.vision_model(pixels_of(IMAGES, config))
        z_i = model.visual_projection(vision.pooler_output)
        return z_i, model.text_projection(text.pooler_output)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_huggingface_by_the_command(activation, tmp_path):
    model = huggingface(activation)
    model.save_pretrained(tmp_path / "theirs")
    convert(["clip", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    part = load_part(tmp_path / "ours", kind="clip")
    assert part.stage.unit_embeddings
    check_embeddings(part, *hf_embeddings(model))


def edit(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


# Ids 2, 7, 38 and 39 once or twice, in another order; one caption lacks the last of them.
MANY_ENDS = [[38, 5, 2, 7, 39, 3, 7, 2, 0], [1, 39, 7, 3, 38, 2, 39, 7, 0], [1, 7, 38, 2] + 5 * [3]]


@pytest.mark.parametrize("end", [7, 38, 39, 2])
def test_text_is_pooled_where_transformers_pools(end, tmp_path):
    """2 is an old mistake of many files: transformers then reads where the highest id is."""
    model = huggingface(text_changes={"eos_token_id": end})
    model.save_pretrained(tmp_path / "theirs")
    convert(["clip", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    part = load_part(tmp_path / "ours")
    tokens = jnp.array([ids for ids in MANY_ENDS if end in ids])
    check_embeddings(part, *hf_embeddings(model, tokens=tokens), tokens=tokens)


def test_legacy_settings_are_read_as_transformers_reads_them(tmp_path):
    """Old files say text_config_dict, which counts before text_config."""
    model = huggingface("gelu")
    model.save_pretrained(tmp_path)

    def as_of_old(settings):
        for name in ("text_config", "vision_config"):
            settings[f"{name}_dict"] = settings.pop(name)
        settings["text_config"] = {"hidden_size": 999, "num_attention_heads": 9}

    edit(tmp_path / "config.json", as_of_old)
    check_embeddings(clip.load(tmp_path), *hf_embeddings(model))


def test_towers_with_perceptrons_of_their_own_width(tmp_path):
    """bigG's is 8192 / 1664 of the width, which no float is exactly."""
    model = huggingface("gelu", intermediate_size=173)
    model.save_pretrained(tmp_path)
    check_embeddings(clip.load(tmp_path), *hf_embeddings(model))
    for hidden, width in ((8192, 1664), (6144, 1408), *((h, 97) for h in range(1, 400))):
        assert int(width * clip_configs.ratio(hidden, width)) == hidden


def test_pixels_are_normalised_as_the_folder_says(tmp_path):
    model = huggingface()
    model.save_pretrained(tmp_path)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    processor = transformers.CLIPImageProcessor(
        size=14, crop_size=14, image_mean=list(mean), image_std=list(std)
    )
    processor.save_pretrained(tmp_path)
    convert(["clip", str(tmp_path), "--out", str(tmp_path / "ours")])
    config = dataclasses.replace(CONFIG, pixel_mean=mean, pixel_std=std)
    part = load_part(tmp_path / "ours")
    assert part.stage.model == config
    check_embeddings(part, *hf_embeddings(model, config))
    edit(tmp_path / "preprocessor_config.json", lambda s: s.update(do_normalize=False))
    config = dataclasses.replace(CONFIG, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
    check_embeddings(clip.load(tmp_path), *hf_embeddings(model, config))
    for change, message in (
        ({"size": {"height": 14, "width": 15}}, "size: got .*'height': 14"),
        ({"size": {"shortest_edge": 13}}, "size: got .*13.*image_size = 14"),
        ({"size": {"longest_edge": 14}}, "size: got|transformers refuses"),
        ({"resample": 1}, "resample: got 1, expected one of 2, 3"),
        ({"do_center_crop": False}, "size: got .*do_center_crop"),
        ({"do_resize": False}, "do_resize: got False"),
        ({"do_rescale": False}, "do_rescale: got False"),
        ({"do_pad": True}, "do_pad: got True"),
        ({"image_processor_type": "BlipImageProcessor"}, "type: got 'BlipImageProcessor'"),
        ({"crop_size": 28}, "crop_size"),
        ({"rescale_factor": 1.0}, "rescale_factor: got 1.0, expected 1/255"),
        ({"image_mean": [0.5]}, "mean of the pixels"),
    ):
        processor.save_pretrained(tmp_path)
        edit(tmp_path / "preprocessor_config.json", lambda s, c=change: s.update(c))
        with pytest.raises(UserError, match=message):
            clip.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": {"shortest_edge": 16}, "resample": 2}, ("shortest", 16, "bilinear")),
        ({"size": {"height": 14, "width": 14}, "do_center_crop": False}, ("squash", 0, "bicubic")),
        ({"size": {"height": 16, "width": 16}}, ("squash", 16, "bicubic")),
        ({"image_processor_type": "CLIPImageProcessorFast"}, ("shortest", 0, "bicubic")),
        (
            # what it doesn't say is as this processor has it, not as CLIP's
            {"image_processor_type": "ViTImageProcessor", "size": 14, "resample": None},
            ("squash", 0, "bilinear"),
        ),
    ],
)
def test_pictures_are_resized_as_the_folder_says(change, expected, tmp_path):
    huggingface().save_pretrained(tmp_path)
    settings = {"size": 14, "crop_size": 14, "image_processor_type": "CLIPImageProcessor"}
    settings = {k: v for k, v in (settings | change).items() if v is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    config = clip.load(tmp_path).stage.model
    assert (config.resize_mode, config.resize_to, config.interpolation) == expected
    is_vit = "ViT" in settings["image_processor_type"]
    assert config.pixel_mean == ((0.5,) * 3 if is_vit else CONFIG.pixel_mean)


def test_pixels_are_found_wherever_the_folder_says_them(tmp_path, capsys):
    """transformers 5 writes a processor whole; of a folder of two layouts either may say it."""
    huggingface().save_pretrained(tmp_path / "one")
    Tokenizer(9, 600).save(tmp_path / "tokens")
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokens")
    pixels = transformers.CLIPImageProcessor(size=14, crop_size=14, image_mean=[0.5, 0.5, 0.4])
    transformers.CLIPProcessor(pixels, tokens).save_pretrained(tmp_path / "processor")
    file = tmp_path / "processor" / "processor_config.json"
    convert(["clip", str(tmp_path / "one"), "--out", str(tmp_path / "ours")])
    said = capsys.readouterr().out
    assert "how pictures are prepared" in said and "the tokenizer; taken to be as OpenAI's" in said
    (tmp_path / "one" / file.name).write_bytes(file.read_bytes())
    assert clip.load(tmp_path / "one").stage.model.pixel_mean == (0.5, 0.5, 0.4)
    save_openclip(their_clip("gelu"), tmp_path / "two", openclip_settings())
    (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    assert clip.load(tmp_path / "two").stage.model.pixel_mean == (0.5, 0.5, 0.4)
    settings = json.dumps({"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    (tmp_path / "one" / file.name).unlink()
    (tmp_path / "one" / "open_clip_config.json").write_text(settings)
    assert clip.load(tmp_path / "one").stage.model.pixel_mean == (0.1, 0.2, 0.3)


CAPTIONS = [
    "a photo of a cat", "", "the ‘curly’ “quotes”", "&lt;b&gt; &amp; entities",
    "naïve café ΟΔΥΣΣΕΥΣ", "🍎 red apple", "ﬁne ａｂ", "spelled <|endoftext|> out!",
    "many words " * 9, "schÃ¶n",
]  # fmt: skip


@pytest.mark.parametrize("odd", [False, True], ids=["CLIP's vocabulary", "another"])
def test_the_folders_tokenizer_travels(odd, tmp_path):
    """The ids of AutoTokenizer, from the public folder and from ours, padding included."""
    config = dataclasses.replace(CONFIG, vocab_size=700)
    text, vision = karlo_folders.clip_settings(config)
    settings = transformers.CLIPConfig(projection_dim=11, text_config=text, vision_config=vision)
    transformers.CLIPModel(settings).save_pretrained(tmp_path / "theirs")
    Tokenizer(9, 700).save(tmp_path / "theirs")
    if odd:
        merges = tmp_path / "theirs" / "merges.txt"
        merges.write_text("\n".join(merges.read_text().splitlines()[:150]) + "\n")
        edit(tmp_path / "theirs" / "tokenizer_config.json", lambda s: s.update(pad_token="!"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=9).input_ids
    convert(["clip", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    size = (tmp_path / "ours" / "config.json").stat().st_size
    assert size < 6_000 or odd  # CLIP's own vocabulary is not written again
    with pytest.warns(UserWarning, match="longer than 9 tokens"):
        for part in (clip.load(tmp_path / "theirs"), load_part(tmp_path / "ours")):
            np.testing.assert_array_equal(tokenizer(part).encode(CAPTIONS), expected)
        assert not np.array_equal(Tokenizer(9, 700).encode(CAPTIONS[2:3]), expected[2:3])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    huggingface().save_pretrained(tmp_path)
    Tokenizer(9, 700).save(tmp_path)
    with pytest.raises(UserError, match="eos_token_id is 39, but its tokenizer ends a text with"):
        clip.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        clip.load(tmp_path)


@pytest.mark.parametrize("layout", ["huggingface", "openclip"])
def test_captions_need_the_tokenizer_of_other_ids_than_openais(layout, tmp_path):
    if layout == "openclip":
        save_openclip(their_clip("gelu"), tmp_path, openclip_settings())
    else:
        huggingface(text_changes={"eos_token_id": 7}).save_pretrained(tmp_path)
    end = 39 if layout == "openclip" else 7
    with pytest.raises(UserError, match=f"has 40 ids, of which {end} ends a text, and came with"):
        tokenizer(clip.load(tmp_path))


def test_a_legacy_end_below_other_ids(tmp_path):
    """transformers reads z_t at the highest id: fine where only rows of the table are above it."""
    config = dataclasses.replace(CONFIG, vocab_size=710)
    text, vision = karlo_folders.clip_settings(config)
    settings = transformers.CLIPConfig(
        projection_dim=11, text_config=text | {"eos_token_id": 2}, vision_config=vision
    )
    model = karlo_folders.randomise(transformers.CLIPModel(settings), 0)
    model.save_pretrained(tmp_path)
    Tokenizer(9, 700).save(tmp_path)
    part = clip.load(tmp_path)
    tokens = tokenizer(part).encode(["a cat", "on a mat"])
    check_embeddings(part, *hf_embeddings(model, tokens=tokens), tokens=jnp.asarray(tokens))
    added = transformers.AutoTokenizer.from_pretrained(tmp_path)
    added.add_tokens(["<new>"])
    added.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"ids above the 699 .*; write eos_token_id 699 in the conf"
    ):
        clip.load(tmp_path)


def test_a_folder_is_read_without_pytorch(tmp_path):
    """As where torch is not installed; transformers says nothing of it."""
    huggingface().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size=14, crop_size=14).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from unclip_jax.weights.convert import clip\n"
        "assert 'transformers' not in sys.modules\n"
        f"print(clip.load({str(tmp_path)!r}).stage.model.vocab_size)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("40\n", "")


def test_towers_cut_apart(tmp_path):
    """As Karlo's image-variation repository keeps them; joined, only the temperature is lost."""
    model = huggingface()
    kinds = {
        "text": (transformers.CLIPTextModelWithProjection, model.config.text_config),
        "image": (transformers.CLIPVisionModelWithProjection, model.config.vision_config),
    }
    for name, (kind, settings) in kinds.items():
        tower = kind(settings)
        tower.load_state_dict(model.state_dict(), strict=False)
        tower.save_pretrained(tmp_path / name)
    z_i, z_t = hf_embeddings(model)
    check_embeddings(clip.load_huggingface([tmp_path / "text", tmp_path / "image"]), z_i, z_t)
    text = clip.load(tmp_path / "text")
    stage = dataclasses.replace(text.stage, unit_embeddings=False)
    assert relative_error(stage.encode_text(text.params, TOKENS)[0], z_t) < TOLERANCE
    with pytest.raises(UserError, match="image tower is needed"):
        stage.encode_image(text.params, IMAGES)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "siglip", "model_type: got 'siglip', expected clip or"),
        ("vision_config", None, "do not fit"),  # transformers takes ViT-B/32 then
        ("text_config", {"hidden_size": "16"}, "transformers refuses it"),
        ("text_config", {"hidden_act": "relu"}, "towers differ in hidden_act"),
        ("text_config", {"eos_token_id": 50000}, "eos_token_id: got 50000, expected one id below"),
        ("projection_dim", 12, "do not fit"),
        ("text_config", {"eos_token_id": [7]}, r"eos_token_id: got \[7\], expected one id below"),
        ("auto_map", {"AutoModel": "mine.py"}, "auto_map: got .*mine.py"),
        ("quantization_config", {"bits": 4}, "quantization_config: got"),
    ],
)
def test_what_is_no_clip(field, value, message, tmp_path):
    huggingface().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        clip.load(tmp_path / "theirs")


def test_a_resnet_is_refused_in_words(tmp_path):
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "RN50.pt")
    with pytest.raises(UserError, match=r"visual.conv1.weight.*expected OpenAI's CLIP with a ViT"):
        clip.load(tmp_path / "RN50.pt")
