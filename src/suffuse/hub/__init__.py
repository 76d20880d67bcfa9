"""Repositories of checkpoints: fetched file by file into the cache that all libraries share, and published."""
