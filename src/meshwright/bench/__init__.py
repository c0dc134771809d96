"""Tables and comparisons: predictions held against measured runs."""
