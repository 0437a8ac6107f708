"""The settings of each program: frozen dataclasses that import neither torch nor transformers."""
