"""The command-line tool: the process that its user sees, and the process that does the work."""
