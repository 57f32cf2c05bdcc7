"""What fits which GPUs: arithmetic on sizes, never on weights."""
