"""Choose and weight fine-tuning data by gradients. The public face is what ``__all__`` lists."""

__version__ = "0.1.0"

__all__ = ["__version__"]
