"""Benchmarks against the papers' loops and the best plain PyTorch; results/ holds the measurements of each machine."""
