"""Parts of `deploy.py`: models and images, runtimes and number formats, tables."""
