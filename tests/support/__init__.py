"""Code that tests share: models, comparisons, damaged files."""
