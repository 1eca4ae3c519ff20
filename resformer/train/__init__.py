"""Training: length-grouped batches, one accelerate loop, fine-tuning on a task."""
