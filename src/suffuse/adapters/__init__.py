"""Adapters: loaded onto a pipeline, removed without a trace."""
