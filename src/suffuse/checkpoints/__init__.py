"""Folders of weights and configurations, read and written."""
