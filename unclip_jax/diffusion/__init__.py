"""Diffusion mathematics that knows no network: jax and NumPy alone."""
