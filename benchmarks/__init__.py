"""Benchmarks against the papers' loops and the best plain PyTorch; results/ holds what was measured, and where."""
