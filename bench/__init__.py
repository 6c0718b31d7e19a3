"""bench: parameter-efficient fine-tuning for multi-task dense vision, compared on equal terms."""

__version__ = "0.1.0"
