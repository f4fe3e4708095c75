"""The worker: stays beside its data, trains what it is sent, sends back what changed. Never sees another worker."""
