"""The process that trains: the only place that imports torch, peft, bitsandbytes and accelerate. Never imports the page."""
