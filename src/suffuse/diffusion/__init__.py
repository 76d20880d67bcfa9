"""The core: one loop and its four plug points."""
