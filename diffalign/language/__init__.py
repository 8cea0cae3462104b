"""Prompt rewriters: a small language model learns to write the prompts that a frozen pipeline follows best.

The recipe of Prompt-A-Video (arXiv 2412.15156) for any pipeline and any of our rewards; training is TRL's alone.
"""
