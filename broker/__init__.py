"""What crosses the wire, and the ways across it. Knows nothing of training, rounds or files of a run."""
