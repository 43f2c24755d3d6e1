"""Run work in this process's threads or in the tasks of a Ray cluster. Knows nothing about the work itself."""
