"""The programs behind the figures, and the study."""
