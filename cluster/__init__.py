"""What machines a run gets: local Ray, a running Ray cluster, job submission."""
