"""The models that the harness compares. Knows nothing of the harness; a method is one file in this folder."""
