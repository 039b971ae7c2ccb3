"""QLoRA Lab's core: datasets in, adapters and evidence out. Importing it loads neither torch nor gradio."""

__version__ = "0.1.0"
