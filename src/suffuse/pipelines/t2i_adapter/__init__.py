"""T2I-Adapters: text to image with the features of further pictures."""
