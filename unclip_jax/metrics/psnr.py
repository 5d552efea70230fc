"""How near pictures are to others, pixel by pixel."""

from __future__ import annotations

import numpy as np


def psnr(images: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [b, h, w, c], the mean over the batch."""
    error = (images.astype(np.float64) - truth) ** 2
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error.mean((1, 2, 3)), 1e-10))))
