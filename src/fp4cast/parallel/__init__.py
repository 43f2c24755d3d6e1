"""Who does the work: threads of this process, or the tasks of a Ray cluster. Knows nothing of what the work is."""
