"""Ops in CUDA C++: plans of tiles, arguments of kernels and their launches (backend `cuda`)."""
