"""Measurements on any Hugging Face model, one per file."""
