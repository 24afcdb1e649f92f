"""Triton kernels. Installed as itm_fast.kernels; never import it as top-level `kernels`."""

if __name__ != "itm_fast.kernels":
    raise ImportError("import itm_fast.kernels, not kernels: `pip install .`, or put the checkout on the path")
