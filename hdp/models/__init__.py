"""Hugging Face models on the HDP path."""
