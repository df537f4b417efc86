"""Looking and counting: accuracy, intervals, token credit, leaks. Never trains."""
