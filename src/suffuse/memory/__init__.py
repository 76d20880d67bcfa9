"""Where models are while they are used and while they wait, and how much room they need."""
