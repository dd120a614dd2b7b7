"""A model's files in every form: Hugging Face directories, GGUF, PEFT adapters, classifiers, our own artifacts."""
