"""Training layers."""
