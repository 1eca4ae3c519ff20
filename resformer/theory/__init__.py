"""Reproductions of the theory behind residual connections: claims, their laws, and what is measured."""
