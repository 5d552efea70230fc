"""diffusers' DDPMScheduler as our diffusion and sampling, and back: Kandinsky's decoder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.common.checks import choice, count, number
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.diffusion.schedules import Schedule
from unclip_jax.errors import UserError, wrong

Settings = dict[str, Any]

# What diffusers takes where a scheduler_config.json leaves a field out.
DDPM: Settings = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
# Their two others have no use: "fixed_large_log" takes a root of a negative number.
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid"}
_NAMES |= {"squaredcos_cap_v2": "cosine"}
_ENDS = ("linear", "scaled_linear", "sigmoid")


def read_ddpm(given: Mapping[str, Any], steps: int, where: str) -> tuple[Diffusion, Sampling]:
    """Our diffusion and sampling settings of diffusers' DDPMScheduler.

    The last step adds no noise here. Theirs adds a trace where the last timestep is not 0: 1e-10 of
    a standard deviation with a fixed variance.

    Args:
        given: scheduler_config.json.
        steps: how many to sample in, which that file does not say.
        where: that file, for errors.

    Raises:
        UserError: a field is unknown, or asks for what our diffusion doesn't do.
    """
    choice(f"{where}: _class_name", given.get("_class_name", "DDPMScheduler"), ("DDPMScheduler",))
    for field, value in given.items():
        if not field.startswith("_") and field not in DDPM and value:
            raise UserError(
                f"{where}: field {field!r} is {value!r}, which unclip_jax does not know; expected"
                " a scheduler_config.json of diffusers' DDPMScheduler"
            )
    given = DDPM | given
    predicted = choice(f"{where}: prediction_type", given["prediction_type"], _PREDICTIONS)
    variance = choice(f"{where}: variance_type", given["variance_type"], _VARIANCES)
    try:
        diffusion = Diffusion(
            steps=count(f"{where}: num_train_timesteps", given["num_train_timesteps"]),
            schedule=_schedule(given, where),
            prediction=_PREDICTIONS[predicted],
            variance=variance,
            loss="hybrid" if variance == "learned_range" else "simple",
        )
        sampling = Sampling("ddpm", _spacing(given, steps, where), **_limits(given, where))
        diffusion.process(sampling.spacing)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    return diffusion, sampling


def _schedule(given: Settings, where: str) -> Schedule:
    """The betas. Ours are scaled by 1000 / steps, theirs are not."""
    zero = {"zero_terminal_snr": bool(given["rescale_betas_zero_snr"])}
    if (betas := given["trained_betas"]) is not None:
        steps = given["num_train_timesteps"]
        if not isinstance(betas, list) or len(betas) != steps:
            found = f"{len(betas)} of them" if isinstance(betas, list) else betas
            raise wrong(
                f"{where}: trained_betas", found, f"a list of num_train_timesteps = {steps}"
            )
        return Schedule.own("betas", betas, **zero)
    name = _NAMES[choice(f"{where}: beta_schedule", given["beta_schedule"], _NAMES)]
    if name not in _ENDS:
        return Schedule(name, **zero)
    ends = (number(f"{where}: {end}", given[end], above=0) for end in ("beta_start", "beta_end"))
    start, end = (beta * given["num_train_timesteps"] / 1000 for beta in ends)
    return Schedule(name, beta_start=start, beta_end=end, **zero)


def _spacing(given: Settings, steps: int, where: str) -> str:
    spacings = ("linspace", "leading", "trailing")
    kind = choice(f"{where}: timestep_spacing", given["timestep_spacing"], spacings)
    offset = count(f"{where}: steps_offset", given["steps_offset"], least=0)
    if kind == "leading":
        return f"leading:{steps}" + (f":{offset}" if offset else "")
    return f"trailing:{steps}" if kind == "trailing" else str(steps)


def _limits(given: Settings, where: str) -> dict[str, float]:
    """What a predicted x_0 is kept to; thresholding comes before clipping, as theirs does."""
    if given["thresholding"]:
        most = number(f"{where}: sample_max_value", given["sample_max_value"], least=1)
        ratio = number(f"{where}: dynamic_thresholding_ratio", given["dynamic_thresholding_ratio"])
        return {"dynamic_percentile": round(100 * ratio, 6), "dynamic_most": most}
    if given["clip_sample"]:
        field = "clip_sample_range"
        return {"clip_x_0": number(f"{where}: {field}", given[field], above=0)}
    return {}


def ddpm_settings(diffusion: Diffusion, sampling: Sampling) -> Settings:
    """scheduler_config.json of diffusers' DDPMScheduler.

    Raises:
        UserError: it has no such schedule, prediction, grid or limit.
    """
    schedule = diffusion.noise
    settings = DDPM | {"num_train_timesteps": diffusion.steps, "clip_sample": False}
    settings["variance_type"] = diffusion.variance
    settings["rescale_betas_zero_snr"] = schedule.zero_terminal_snr
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    if schedule.name == "betas":
        settings["trained_betas"] = list(schedule.table)
    else:
        settings["beta_schedule"] = names[choice("diffusion.schedule", schedule.name, names)]
    if schedule.name in _ENDS:
        betas = schedule.betas(diffusion.steps)
        ends = schedule.beta_start, schedule.beta_end
        if schedule.name == "sigmoid" and None in ends:
            raise wrong("diffusion.schedule", schedule, "one that says beta_start and beta_end")
        scaled = (e and e * 1000 / diffusion.steps for e in ends)
        settings["beta_start"], settings["beta_end"] = (
            own or float(beta) for own, beta in zip(scaled, betas[[0, -1]], strict=True)
        )
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    found = choice("diffusion.prediction", diffusion.prediction, predictions)
    settings["prediction_type"] = predictions[found]
    name, _, offset = str(sampling.spacing).partition(":")
    spacings = {"leading": "leading", "trailing": "trailing", "even": "linspace"}
    if name.isdigit():
        name = "even"
    settings["timestep_spacing"] = spacings[choice("sampling.spacing", name, spacings)]
    if name == "leading":
        settings["steps_offset"] = int(float((offset + ":0").split(":")[1]))
    if sampling.dynamic_percentile:
        if sampling.clip_x_0 not in (0.0, 1.0) or not sampling.dynamic_most:
            expected = "one with dynamic_most, of data in [-1, 1]"
            raise wrong("sampling", sampling, expected, "diffusers has no other thresholding")
        settings |= {"thresholding": True, "sample_max_value": sampling.dynamic_most}
        settings["dynamic_thresholding_ratio"] = sampling.dynamic_percentile / 100
    elif sampling.clip_x_0:
        settings |= {"clip_sample": True, "clip_sample_range": sampling.clip_x_0}
    return settings
