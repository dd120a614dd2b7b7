"""A model's files in every form: Hugging Face directories, GGUF, PEFT adapters, classifiers, our own artifacts."""

import os

# "PyTorch was not found" is no news: tokenizers and configurations need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
