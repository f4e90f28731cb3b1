"""SavedModels of every kind."""
