"""Names that the command line lists without importing torch."""

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")
