"""srpo: train a language model to judge e-commerce search relevance step by step, and to be right (TaoSR-SHE)."""

__version__ = "0.1.0"
