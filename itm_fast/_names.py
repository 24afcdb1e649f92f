"""Names that the command line lists, and that need nothing imported."""

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")
