"""The published training recipe, and checkpoints in the published format."""
