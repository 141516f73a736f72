"""Solvers: from noise to samples of a denoiser."""
