"""Pictures from noise alone, in the space of pixels."""
