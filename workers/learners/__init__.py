"""Example learners. Each is one plain file that imports nothing from fluffle; copy one to write your own."""
