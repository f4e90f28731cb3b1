"""Plans that must not change by accident: networks, and what was decided for them, as data."""
