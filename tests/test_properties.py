"""What holds whatever is given: schedules, samplers, captions, pictures, model folders.

Hypothesis looks for the case in which it does not. The draws are the same in every run.
"""

import io
import tempfile
import warnings
import zlib
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.networks import said
from unclip_jax.common import grids
from unclip_jax.common.params import fingerprint, flatten
from unclip_jax.data.images import square
from unclip_jax.data.records import BadRecord
from unclip_jax.data.tokenizer import VOCAB_SIZE, Tokenizer
from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.guidance import classifier_free
from unclip_jax.diffusion.samplers import Sampling, sample
from unclip_jax.diffusion.schedules import SCHEDULES
from unclip_jax.errors import UserError
from unclip_jax.weights import folder as model_folder

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("repeatable")


def examples(number):
    return hypothesis.settings(max_examples=number)


# Schedules


@st.composite
def diffusions(draw, most=400):
    schedule = draw(st.sampled_from(SCHEDULES))
    steps = draw(st.integers(1 if schedule == "cosine" else 21, most))
    return gaussian.Diffusion(
        steps=steps,
        schedule=schedule,
        prediction=draw(st.sampled_from(gaussian.PREDICTIONS)),
        variance=draw(st.sampled_from([v for v in gaussian.VARIANCES if v != "learned_range"])),
    )


@st.composite
def spacings(draw, steps):
    """Of any form, with any numbers that fit."""
    kept = draw(st.integers(1, steps))
    return draw(st.sampled_from(["", str(kept), f"ddim{kept}"]))


@examples(100)
@given(st.data())
def test_every_process_keeps_its_identities(data):
    diffusion = data.draw(diffusions())
    spacing = data.draw(spacings(diffusion.steps))
    try:
        process = diffusion.process(spacing)
    except UserError:  # ddimN needs a whole stride
        assert spacing.startswith("ddim")
        return
    whole = diffusion.process()
    t = process.timesteps
    assert np.all(np.diff(t) > 0) and t[0] >= 0 and t[-1] < diffusion.steps
    for table in process:
        assert table.shape == t.shape and np.all(np.isfinite(table)) and not table.flags.writeable
    np.testing.assert_array_equal(process.alpha_bar, whole.alpha_bar[t])  # respacing keeps q(x_t)
    assert np.all(np.diff(process.alpha_bar) < 0) and process.alpha_bar_prev[0] == 1
    signal, noise = process.sqrt_alpha_bar, process.sqrt_one_minus_alpha_bar
    np.testing.assert_allclose(signal**2 + noise**2, 1, atol=1e-6)
    assert np.all((process.betas > 0) & (process.betas <= 1))  # 1 - 8e-9 is 1 in float32
    # Where x_t is its mean, sqrt(alpha_bar) x_0, so is the posterior's mean.
    np.testing.assert_allclose(
        process.posterior_mean_x_0 + process.posterior_mean_x_t * process.sqrt_alpha_bar,
        process.sqrt_alpha_bar_prev,
        atol=2e-6,
    )
    assert np.all(process.posterior_variance <= process.betas * (1 + 1e-6))


@examples(12)
@given(st.data())
def test_a_network_that_knows_the_answer_is_led_to_it(data):
    """Any method, steps, prediction, shape and guidance, where condition and null agree."""
    diffusion = data.draw(diffusions(most=100))
    shape = data.draw(st.sampled_from([(3,), (2, 2, 1), (1,)]))
    method = data.draw(st.sampled_from(["ddpm", "ddim", "dpm++"]))
    kept = str(data.draw(st.integers(1, min(5, diffusion.steps))))
    scale = data.draw(st.floats(0, 20))
    answer = jax.random.uniform(jax.random.key(0), (2, *shape), minval=-1, maxval=1)

    def network(x_t, t, condition):
        process = diffusion.process()
        alpha = gaussian.at(process.sqrt_alpha_bar, t, x_t)
        sigma = gaussian.at(process.sqrt_one_minus_alpha_bar, t, x_t)
        return said(diffusion.prediction, condition, x_t, alpha, sigma)

    @jax.jit
    def draw(scale):
        denoise = classifier_free(network, answer, answer, scale)
        x_T = jax.random.normal(jax.random.key(1), answer.shape)
        keys = jax.random.split(jax.random.key(2), len(answer))
        return sample(denoise, x_T, keys, diffusion, Sampling(method=method, spacing=kept))

    # Where hardly any signal is left, float32 keeps as little of the answer in eps and v.
    last = float(diffusion.process(kept).sqrt_alpha_bar[-1])
    room = 1e-4 + (0 if diffusion.prediction == "x_0" else 1e-5 * (1 + scale) / last)
    hypothesis.assume(room < 0.1)
    np.testing.assert_allclose(draw(scale), answer, atol=room)


# Captions

# Lone surrogates too: what reading a file with errors="surrogateescape" gives.
ANYTHING = st.text(st.characters(), max_size=60) | st.text(
    st.characters(categories=["Cs", "Cc", "Mn", "So", "Lo", "Zs"]), max_size=60
)


@pytest.mark.parametrize(("length", "vocab_size"), [(77, VOCAB_SIZE), (12, 600), (3, 514)])
def test_any_caption_is_tokens(length, vocab_size):
    tokenizer = Tokenizer(length, vocab_size)

    @examples(150)
    @given(st.lists(ANYTHING, min_size=1, max_size=3))
    def check(texts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of captions that are cut
            tokens = tokenizer.encode(texts)
            again = np.stack([tokenizer.encode([text])[0] for text in texts])
        assert tokens.dtype == np.int32 and tokens.shape == (len(texts), length)
        np.testing.assert_array_equal(tokens, again)  # whatever stands beside it
        assert np.all(tokens[:, 0] == tokenizer.start_token)
        for row in tokens:
            ends = np.flatnonzero(row == tokenizer.end_token)
            assert len(ends) == 1 and np.all(row[ends[0] + 1 :] == 0)
            inside = row[1 : ends[0]]
            assert np.all((inside >= 0) & (inside < tokenizer.start_token))
        assert all(isinstance(text, str) for text in tokenizer.decode(tokens))

    check()


@examples(25)
@given(st.lists(ANYTHING, min_size=1, max_size=3), st.integers(1, 40), ANYTHING)
def test_any_caption_can_stand_under_a_picture(captions, side, title):
    images = [np.full((side, side, 3), 100, np.uint8)] * len(captions)
    grid = np.asarray(grids.captioned_grid(images, captions, title=title))
    assert grid.dtype == np.uint8 and grid.ndim == 3


# Pictures

# What each format can hold of what Pillow calls modes.
FILES = [
    ("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
] + [
    ("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
] + [
    ("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("GIF", "L"),
    ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("BMP", "1"), ("PPM", "RGB"),
]  # fmt: skip


def picture(mode, width, height, level):
    """A picture of one grey in any mode."""
    if mode == "I;16":
        return Image.fromarray(np.full((height, width), level * 257, np.uint16))
    grey = Image.new("L", (width, height), level)
    if mode == "P":
        return grey.convert("RGB").quantize()
    return grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)


def file_of(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@examples(250)
@given(
    st.sampled_from(FILES),
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from([0, 255, 96]),
    st.integers(1, 40),
)
def test_a_grey_picture_stays_grey_in_any_file(file, width, height, level, size):
    form, mode = file
    level = level if mode != "1" or level in (0, 255) else 0
    result = square(file_of(picture(mode, width, height, level), form), size)
    assert result.dtype == np.uint8 and result.shape == (size, size, 3)
    lossy = 4 if form in ("JPEG", "WEBP") or mode == "CMYK" else 1
    assert np.max(np.abs(result.astype(int) - level)) <= lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(orientation):
    """The file's pixels turned as EXIF says a camera did; upright, red is on top."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :, 0], pixels[16:, :, 2] = 255, 255
    diagonal = np.swapaxes(pixels, 0, 1)
    turned = {
        1: pixels, 2: np.fliplr(pixels), 3: np.rot90(pixels, 2), 4: np.flipud(pixels),
        5: diagonal, 6: np.rot90(pixels), 7: np.rot90(diagonal, 2), 8: np.rot90(pixels, 3),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    np.testing.assert_array_equal(square(file_of(image, "PNG", exif=exif), 32), pixels)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for form in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = file_of(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(square(data, 8), np.full((8, 8, 3), (255, 0, 0)))


@examples(150)
@given(st.sampled_from(FILES), st.data())
def test_a_broken_picture_is_bad_or_a_picture(file, data):
    """Cut anywhere, or with bytes changed; never anything but an array or BadRecord in a line."""
    form, mode = file
    content = bytearray(file_of(picture(mode, 9, 7, 255), form))
    del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it skips
        try:
            result = square(bytes(content), 5)
        except BadRecord as error:
            assert "\n" not in str(error)
        else:
            assert result.shape == (5, 5, 3) and result.dtype == np.uint8


@examples(100)
@given(st.binary(max_size=200))
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadRecord):
        square(data, 5)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    """A PNG of a few bytes that says it has 10^10 pixels."""
    content = bytearray(file_of(Image.new("1", (1, 1)), "PNG"))
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(BadRecord, match=r"exceeds|more than"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        square(bytes(content), 8)


def test_a_format_that_needs_another_program_is_not_opened():
    """For EPS Pillow starts Ghostscript, on whatever the file holds."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"
    with pytest.raises(BadRecord, match="no known format"):
        square(program, 8)


# Model folders

NAMES = st.text(
    st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=6
)
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return (rng.normal(size=shape) * 10).astype(dtype)


TREES = st.recursive(
    arrays(), lambda child: st.dictionaries(NAMES, child, min_size=1, max_size=3), max_leaves=6
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(NAMES, child, max_size=3),
    max_leaves=6,
)  # fmt: skip


@examples(60)
@given(
    st.dictionaries(NAMES, TREES, min_size=1, max_size=3), st.dictionaries(NAMES, JSON, max_size=3)
)
def test_any_params_and_description_come_back(params, description):
    with tempfile.TemporaryDirectory() as folder:
        model_folder.save_stage(Path(folder) / "m", params=params, description=description)
        loaded, described = model_folder.load_stage(Path(folder) / "m")
        assert model_folder.read_fingerprint(Path(folder) / "m") == fingerprint(loaded)
    assert described == description
    found, given = flatten(loaded), flatten(params)
    assert list(found) == list(given)
    for name, value in given.items():
        back = np.asarray(found[name])
        assert back.dtype == value.dtype and back.shape == value.shape
        assert back.tobytes() == value.tobytes()
