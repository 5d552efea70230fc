"""Guidance against closed forms, its papers' formulas in NumPy, and diffusers' guiders."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import said
from unclip_jax import diffusion
from unclip_jax.diffusion import Diffusion, Sampling, guidance, rules, sample
from unclip_jax.diffusion.gaussian import PREDICTIONS, predict
from unclip_jax.errors import UserError

DIFFUSION = Diffusion(prediction="v")
COND, NULL, OTHER = (jax.random.normal(jax.random.key(i), (3, 8)) for i in range(3))
X_T, T = jax.random.normal(jax.random.key(3), (3, 4)), jnp.array([1, 50, 900])
MIX_X, MIX_Y = (jax.random.normal(jax.random.key(i), (n, 8)) for i, n in ((4, 4), (5, 8)))
SCALE = jnp.array([0.0, 3.0, 8.0])


def network(x_t, t, cond):
    """Prediction, then as many variance channels, of a condition [b, 8]."""
    return jnp.tanh(x_t @ MIX_X + cond @ MIX_Y + 1e-3 * t[:, None])


def short(x_t, t, cond):
    return network(x_t, t, cond)[:, :4]


def exact(cond, x_t=X_T, t=T):
    """The prediction, float64."""
    return np.float64(short(x_t, t, cond))


def predictions():
    return [exact(cond) for cond in (COND, NULL, OTHER)]


def dot(a, b):
    return (a * b).sum(axis=1, keepdims=True)


WRAPPERS = {
    "classifier_free": lambda net, scale, **more: guidance.classifier_free(
        net, COND, NULL, scale, **more
    ),
    "composed": lambda net, scale, **more: guidance.composed(
        net, [COND, OTHER], NULL, [1.0, 0.0], scale, **more
    ),
    "perpendicular": lambda net, scale, **more: guidance.perpendicular(
        net, COND, NULL, OTHER, scale, 0.0, **more
    ),
    "autoguided": lambda net, scale, **more: guidance.autoguided(
        lambda x, t: net(x, t, COND), lambda x, t: net(x, t, NULL), scale, **more
    ),
}
RULES = {
    "linear": guidance.linear,
    "apg": guidance.apg(DIFFUSION, 0.3, 2.5),
    "apg of the output": guidance.apg(None, 0.0, 0.5),
    "zero_star": guidance.zero_star(),
    "rescaled": guidance.rescaled(0.7),
    "all": guidance.rescaled(0.7, guidance.zero_star(guidance.apg(DIFFUSION, 0.5, 3.0))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_wrapper_goes_with_any_rule(wrapper, rule):
    """They make the same of the same two predictions, leave the variance and have a gradient."""
    make = functools.partial(WRAPPERS[wrapper], rule=RULES[rule])
    plain = guidance.classifier_free(short, COND, NULL, SCALE, rule=RULES[rule])(X_T, T)
    np.testing.assert_allclose(make(short, SCALE)(X_T, T), plain, atol=1e-5)
    whole = make(network, SCALE, learned_variance=True)(X_T, T)
    np.testing.assert_allclose(whole[:, :4], plain, atol=1e-5)
    np.testing.assert_array_equal(whole[:, 4:], network(X_T, T, COND)[:, 4:])
    for scale in (1, jnp.float32(1.0), lambda t: jnp.ones(3)):
        np.testing.assert_allclose(make(short, scale)(X_T, T), short(X_T, T, COND), atol=1e-6)

    def total(scale, x):
        return jnp.sum(make(short, scale)(x, T) ** 2)

    slope, direction = jax.grad(total, argnums=(0, 1))(SCALE, X_T)
    step = 1e-2
    found = (total(SCALE + step, X_T) - total(SCALE - step, X_T)) / (2 * step)
    np.testing.assert_allclose(slope.sum(), found, rtol=2e-3)
    assert np.all(np.isfinite(direction))


def test_new_values_of_everything_compile_nothing():
    @jax.jit
    def run(scale, weight, phi, parallel, norm, bounds, first):
        rule = guidance.rescaled(phi, guidance.apg(DIFFUSION, parallel, norm))
        limited = guidance.interval(scale, DIFFUSION, sigma=bounds)
        denoise = guidance.perpendicular(short, COND, NULL, OTHER, limited, weight, rule=rule)
        keys = jax.random.split(jax.random.key(0), 3)
        return sample(
            guidance.zero_init(denoise, first), X_T, keys, DIFFUSION, Sampling("ddim", "4")
        )

    one = run(3.0, 1.0, 0.7, 0.0, 2.0, (0.1, 10.0), 990)
    assert np.any(one != run(4.0, 0.5, 0.6, 0.1, 1.0, (0.2, 5.0), 980))
    assert run._cache_size() == 1


# ------------------------------------------------------------------------------- who is asked


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_autoguidance_follows_the_score_of_the_tilted_density(prediction):
    """grad log (p_good^w / p_bad^(w - 1)) at every noise level, for Gaussians of two widths."""
    diffusion = Diffusion(prediction=prediction)
    process = diffusion.process()
    alpha_bar = np.float64(process.alpha_bar)[np.asarray(T)][:, None]
    x = np.float64(X_T)

    def score(mean, std):
        return -(x - np.sqrt(alpha_bar) * mean) / (alpha_bar * std**2 + 1 - alpha_bar)

    def net(mean, std):
        def denoise(x_t, t):
            eps = -np.sqrt(1 - alpha_bar) * score(mean, std)
            x_0 = (x - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
            return jnp.float32(said(prediction, x_0, x, alpha_bar**0.5, (1 - alpha_bar) ** 0.5))

        return denoise

    guided = guidance.autoguided(net(0.5, 0.3), net(0.2, 0.6), jnp.float32(2.5))(X_T, T)
    _, eps = predict(diffusion, process, guided, X_T, T)
    expected = 2.5 * score(0.5, 0.3) - 1.5 * score(0.2, 0.6)
    np.testing.assert_allclose(-eps / np.sqrt(1 - alpha_bar), expected, rtol=2e-3, atol=1e-3)


def test_conditions_with_weights_multiply_their_densities():
    """Of experts N(m_i, s^2) with one s: N(m_0 + sum of w_i (m_i - m_0), s^2)."""
    diffusion = Diffusion(prediction="eps")
    table = jnp.asarray(diffusion.process().alpha_bar)

    def expert(x_t, t, mean):
        level = table[t][:, None]
        gap = x_t - jnp.sqrt(level) * mean
        return jnp.sqrt(1 - level) * gap / (level * 0.3**2 + 1 - level)

    means = [jnp.full((2, 1), mean) for mean in (0.5, -0.3, 0.1)]
    denoise = guidance.composed(expert, means[:2], means[2], [2.0, jnp.array([0.5, -1.0])])
    x_T = jax.random.normal(jax.random.key(7), (2, 50))
    keys = jax.random.split(jax.random.key(0), 2)
    x_0 = jax.jit(lambda x: sample(denoise, x, keys, diffusion, Sampling("dpm++", "200")))(x_T)
    mean = 0.1 + 2.0 * 0.4 + np.array([[0.5], [-1.0]]) * -0.4
    np.testing.assert_allclose(x_0, mean + 0.3 * x_T, atol=5e-3)


def test_perpendicular_negatives_are_those_of_the_paper():
    c, u, n = predictions()
    positive, negative = c - u, n - u
    step = negative - dot(negative, positive) / dot(positive, positive) * positive
    expected = u + np.asarray(SCALE)[:, None] * (positive - 0.8 * step)
    found = guidance.perpendicular(short, COND, NULL, OTHER, SCALE, 0.8)(X_T, T)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # What is the positive itself is not avoided.
    same = guidance.perpendicular(short, COND, NULL, COND, 3.0, 5.0)(X_T, T)
    np.testing.assert_allclose(same, u + 3.0 * positive, atol=2e-5)


@pytest.mark.parametrize("wrapper, outside", [("classifier_free", 3), ("perpendicular", 3)])
def test_outside_of_the_interval_the_network_runs_one_row_an_example(wrapper, outside):
    rows = []

    def counting(x_t, t, cond):
        jax.debug.callback(lambda t: rows.append((len(x_t), int(t))), t[0])
        return short(x_t, t, cond)

    diffusion, sampling = Diffusion(prediction="v"), Sampling("ddim", "12")
    process = diffusion.process(sampling.spacing)
    scale = guidance.interval(3.0, diffusion, sigma=(0.3, 3.0))
    denoise = WRAPPERS[wrapper](counting, scale)
    keys = jax.random.split(jax.random.key(0), 3)
    jax.jit(lambda x: sample(denoise, x, keys, diffusion, sampling))(X_T)
    jax.effects_barrier()
    sigma = np.sqrt(1 / np.float64(process.alpha_bar) - 1)
    inside = (sigma > 0.3) & (sigma <= 3.0)
    full = {"classifier_free": 6, "perpendicular": 9}[wrapper]
    expected = [
        (full if i else outside, int(t)) for i, t in zip(inside, process.timesteps, strict=True)
    ]
    assert sorted(rows, key=lambda row: row[1]) == expected and 2 < inside.sum() < 10


# ------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_apg_steps_in_x_0_across_what_is_predicted(prediction):
    """The guided x_0 is that of the paper, whatever the network predicts."""
    diffusion, scale = Diffusion(prediction=prediction), 6.0
    process, x, t = diffusion.process(), X_T, jnp.array([100, 500, 800])
    c, u = (jnp.float32(y) for y in (exact(COND), exact(NULL)))

    def x_0(output):
        return np.float64(predict(diffusion, process, output, x, t)[0])

    clean, step = x_0(c), x_0(c) - x_0(u)
    norm = np.median(np.linalg.norm(step, axis=1))
    step = step * np.minimum(1, norm / np.linalg.norm(step, axis=1, keepdims=True))
    lengthwise = dot(step, clean) / dot(clean, clean) * clean
    for parallel in (0.0, 0.4):
        found = guidance.apg(diffusion, parallel, norm)(c, u, scale, x, t)
        expected = clean + (scale - 1) * (step - lengthwise + parallel * lengthwise)
        np.testing.assert_allclose(x_0(found), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        guidance.apg(diffusion, 1.0)(c, u, scale, x, t), u + scale * (c - u), atol=1e-4
    )


def test_zero_star_leads_away_from_the_nearest_multiple():
    c, u, _ = predictions()
    pairs = zip(c, u, strict=True)
    best = np.array([np.linalg.lstsq(b[:, None], a, rcond=None)[0] for a, b in pairs])
    expected = best * u + np.asarray(SCALE)[:, None] * (c - best * u)
    found = guidance.classifier_free(short, COND, NULL, SCALE, rule=guidance.zero_star())(X_T, T)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rescaling_gives_back_the_spread():
    c, u, _ = predictions()
    plain = u + 8.0 * (c - u)
    for phi in (0.0, 0.7, 1.0):
        rule = guidance.rescaled(phi)
        found = guidance.classifier_free(short, COND, NULL, 8.0, rule=rule)(X_T, T)
        ratio = c.std(axis=1, keepdims=True) / plain.std(axis=1, keepdims=True)
        np.testing.assert_allclose(found, plain * (phi * ratio + 1 - phi), atol=1e-5)
    np.testing.assert_allclose(np.std(found, axis=1), c.std(axis=1), rtol=1e-5)


def test_rules_are_those_of_diffusers():
    guiders = pytest.importorskip("diffusers.guiders")
    torch = pytest.importorskip("torch")
    c, u = (np.float32(jax.random.normal(jax.random.key(i), (3, 6, 5, 4))) for i in (11, 12))
    t = jnp.zeros(3, jnp.int32)
    project = functools.partial(
        guiders.AdaptiveProjectedGuidance, adaptive_projected_guidance_rescale=5.0, eta=0.3,
        use_original_formulation=True,
    )  # fmt: skip
    pairs = [
        (project(6.0), guidance.apg(None, 0.3, 5.0)),
        (project(6.0, guidance_rescale=0.6), guidance.rescaled(0.6, guidance.apg(None, 0.3, 5.0))),
        (guiders.ClassifierFreeZeroStarGuidance(7.0), guidance.zero_star()),
        (guiders.ClassifierFreeGuidance(7.0, guidance_rescale=0.7), guidance.rescaled(0.7)),
    ]
    for theirs, ours in pairs:
        theirs.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(1))
        expected = theirs.forward(torch.tensor(c), torch.tensor(u)).pred.numpy()
        # Their scale of the original formulation counts from the conditional model.
        scale = theirs.guidance_scale + (1.0 if theirs.use_original_formulation else 0.0)
        np.testing.assert_allclose(ours(c, u, scale, c, t), expected, atol=2e-5)


def test_zero_init_skips_the_network_from_a_timestep_on():
    calls = []

    def denoise(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return short(x_t, t, COND)

    still = guidance.zero_init(denoise, 900)
    found = still(X_T, T)
    np.testing.assert_array_equal(found[:2], short(X_T, T, COND)[:2])
    np.testing.assert_array_equal(found[2], 0.0)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(still(X_T, T + 900), jnp.zeros((3, 4)))
    jax.effects_barrier()
    assert len(calls) == 1


# ------------------------------------------------------------------------------------ scales


def test_intervals_are_the_same_by_sigma_and_by_log_snr():
    t = jnp.arange(DIFFUSION.steps)
    level = np.float64(DIFFUSION.process().alpha_bar)
    sigma = np.sqrt((1 - level) / level)
    expected = np.where((sigma > 0.28) & (sigma <= 2.9), 4.0, 1.0)
    by_sigma = guidance.interval(4.0, DIFFUSION, sigma=(0.28, 2.9))(t)
    bounds = (-2 * np.log(2.9), -2 * np.log(0.28))
    by_snr = guidance.interval(4.0, DIFFUSION, log_snr=bounds)(t)
    np.testing.assert_array_equal(by_sigma, expected)
    np.testing.assert_array_equal(by_snr, expected)
    np.testing.assert_array_equal(
        guidance.interval(lambda t: 4.0, DIFFUSION, sigma=(0.0, jnp.inf))(t), 4.0
    )


def test_scales_that_change_over_the_steps():
    t = jnp.arange(1000)
    risen = np.asarray(guidance.rising(4.0, DIFFUSION)(t))
    assert abs(risen.mean() - 4.0) < 5e-3 and np.all(np.diff(risen) < 0)
    assert guidance.rising(4.0, DIFFUSION, 0.5)(t).min() == 2.5
    kept = DIFFUSION.process("5").timesteps
    scale = guidance.per_step([1.0, 2.0, 3.0, 4.0, 5.0], kept)
    np.testing.assert_allclose(scale(jnp.asarray(kept)), [5.0, 4.0, 3.0, 2.0, 1.0])

    # A walk under it is a walk by hand with the scale of each step.
    levels = np.append(1.0, np.float64(DIFFUSION.process("5").alpha_bar))
    x = np.float64(X_T)
    for i in range(4, -1, -1):
        rows = jnp.full(3, kept[i])
        c, u = (exact(cond, jnp.float32(x), rows) for cond in (COND, NULL))
        v, a, s = u + (5.0 - i) * (c - u), np.sqrt(levels[i + 1]), np.sqrt(1 - levels[i + 1])
        x_0, eps = a * x - s * v, s * x + a * v
        x = np.sqrt(levels[i]) * x_0 + np.sqrt(1 - levels[i]) * eps
    denoise = guidance.classifier_free(short, COND, NULL, scale)
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(
        sample(denoise, X_T, keys, DIFFUSION, Sampling("ddim", "5")), x, atol=1e-4
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: guidance.interval(2.0, DIFFUSION), "sigma and log_snr: got neither"),
        (lambda: guidance.composed(short, [COND], NULL, []), "weights: got 0, expected one for"),
        (lambda: guidance.per_step([1.0, 2.0], [1, 2, 3]), r"scales' shape: got \(2,\)"),
        (lambda: guidance.perpendicular(short, COND, NULL, OTHER[:2], 2.0), "null condition"),
        (
            lambda: guidance.autoguided(
                lambda x, t: x, lambda x, t: network(x, t, COND), 2.0
            )(X_T, T),
            "weak network output's shape",
        ),
        (
            lambda: guidance.classifier_free(short, COND, NULL, lambda t: jnp.ones(2))(X_T, T),
            "guidance scale's shape",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_pages_examples_run_and_say_the_truth():
    page = (Path(__file__).parent.parent / "docs" / "guidance.md").read_text(encoding="utf-8")
    scope = {}
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    exec(compile(code, "docs/guidance.md", "exec"), scope)
    named = {*rules.__dict__, *guidance.__dict__} & set(diffusion.__all__)
    public = {name for name in named if name.islower()}
    assert not [name for name in public if f"guidance.{name}(" not in code]
    walked = scope["draw"](
        lambda x, t: scope["network"](x, t, scope["null"])
    )  # N(0, 0.3^2), the same noise
    for name, mean in {
        "twice": (2, 0), "away": (2, -1), "both": (1.5, 0.5), "mixed": (1.5, 0.5),
        "better": (1.1, -0.05),
    }.items():  # fmt: skip
        np.testing.assert_allclose(scope[name] - walked, np.tile(mean, (8, 1)), atol=0.02)
    t = jnp.arange(1000)
    np.testing.assert_array_equal(scope["limited"](t), scope["same"](t))


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_pytree_is_guided_as_the_array_of_its_leaves(wrapper, variance):
    """Rules and scales see all of an example; variance channels stay with their leaf."""
    apart = lambda x: {"a": x[:, :3].reshape(3, 1, 3), "b": [x[:, 3:]]}  # noqa: E731
    together = lambda tree: jnp.concatenate([tree["a"][:, 0], tree["b"][0]], axis=1)  # noqa: E731

    def of_tree(x_t, t, cond):
        assert x_t["a"].shape[1:] == (1, 3) and x_t["b"][0].shape[1:] == (1,)
        x = x_t["a"].reshape(-1, 3), x_t["b"][0]
        parts = jnp.split(network(jnp.concatenate(x, axis=1), t, cond), 2, axis=1)
        parts = [{"a": p[:, :3].reshape(-1, 1, 3), "b": [p[:, 3:]]} for p in parts]
        join = lambda *halves: jnp.concatenate(halves[: 1 + variance], axis=-1)  # noqa: E731
        return jax.tree.map(join, *parts)

    told = {"rule": guidance.rescaled(0.7, guidance.apg(norm=0.5)), "learned_variance": variance}
    found = WRAPPERS[wrapper](of_tree, SCALE, **told)(apart(X_T), T)
    expected = WRAPPERS[wrapper](network if variance else short, SCALE, **told)(X_T, T)
    halves = jnp.split(expected, 1 + variance, axis=1)
    for i, half in enumerate(halves):
        mine = jax.tree.map(lambda x, i=i: jnp.split(x, 1 + variance, axis=-1)[i], found)
        np.testing.assert_allclose(together(mine), half, rtol=1e-5, atol=1e-6)
    judge = lambda x, t: -jnp.sum((together(x) - 1) ** 2, axis=1)  # noqa: E731
    flat = lambda x, t: -jnp.sum((x - 1) ** 2, axis=1)  # noqa: E731
    led = guidance.classifier_guided(lambda x, t: x, judge, 2.0, DIFFUSION)(apart(X_T), T)
    straight = guidance.classifier_guided(lambda x, t: x, flat, 2.0, DIFFUSION)(X_T, T)
    np.testing.assert_allclose(together(led), straight, rtol=1e-5)
