"""The coordinator: makes versions out of updates. Never runs a user's code and never imports torch."""
