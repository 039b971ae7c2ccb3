"""The page: the only package that imports gradio. Reads inputs, calls the core, returns outputs; never imports torch."""
