"""Generators of arrays: noise levels and preconditioning, the denoiser, small networks, problems with a known truth."""
