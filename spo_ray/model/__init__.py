"""Models, tokenizers and checkpoints, without Ray."""
