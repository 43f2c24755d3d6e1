"""Run work in threads, in processes, or in the tasks of a Ray cluster. Knows nothing about the work itself."""
