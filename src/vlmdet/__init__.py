"""vlmdet: fine-tune a vision-language model to detect objects, and prove that it learned to."""

__version__ = "0.1.0"
