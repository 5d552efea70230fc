"""unclip_jax: DALL·E 2 (unCLIP) in JAX and Flax."""
