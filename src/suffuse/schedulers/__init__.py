"""The schedulers: noise schedules, prediction conversions, and one update rule a file."""
