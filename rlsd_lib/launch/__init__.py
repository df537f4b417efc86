"""Before and around a run: checks, several processes, clusters."""
