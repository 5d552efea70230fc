"""Meshes of devices, processes, and compiled programs kept between runs."""
