"""Mode "auto": candidates, and timing them in turn."""
