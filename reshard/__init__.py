"""Distributed resharding of LLM checkpoints between training and inference layouts."""
