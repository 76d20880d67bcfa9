"""Pictures from a picture that is seen as a whole, where other pipelines read a prompt."""
