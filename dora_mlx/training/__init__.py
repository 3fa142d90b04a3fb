"""Training: loss, step, loop, checkpoints and events, and the whole story in ``finetune.py``."""
