"""Corruptions of the low-resolution images that upsamplers are conditioned on.

An upsampler trained on clean small images fails on the slightly wrong ones that a decoder makes,
so training corrupts them (unCLIP section 2.1): the first upsampler's by a Gaussian blur, after
Saharia et al. 2021 (arXiv 2104.07636), the second's by BSR degradation, after Zhang et al. 2021
(arXiv 2103.14006) and Rombach et al. 2022 (arXiv 2112.10752). All of it is jittable, and each
example has its own key and its own strength. Nothing here is meant to be differentiated.
"""

from unclip_jax.stages.degrade.blur import (
    correlate,
    gaussian_blur,
    gaussian_kernels,
    random_gaussian_blur,
)
from unclip_jax.stages.degrade.bsr import BSR, BSRGAN, bsr
from unclip_jax.stages.degrade.jpeg import jpeg

__all__ = [
    "BSR",
    "BSRGAN",
    "bsr",
    "correlate",
    "gaussian_blur",
    "gaussian_kernels",
    "jpeg",
    "random_gaussian_blur",
]
